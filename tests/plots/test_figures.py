import json

import numpy as np
import pandas as pd
import pytest

from attnlab.plots import head_map, matrix_figure, pool_matrix, profile, quantise, top_bars
from attnlab.plots.metrics import in_order
from attnlab.plots.profile import layer_means
from attnlab.results import Metric, Result, heads_frame


def rows(kind="self", metric="entropy", layers=2, heads=3):
    return [
        (layer, head, kind, metric, 10.0 * layer + head, 0.5, 7) for layer in range(layers) for head in range(heads)
    ]


def declared(metric, about):
    return Result("study", (), heads_frame(rows(metric=metric)), pd.DataFrame(), {}, metrics={metric: about})


def test_a_head_map_has_layers_down_and_heads_across_with_hover():
    trace = head_map(declared("entropy", Metric("Attention entropy", "nats")), "entropy").data[0]
    assert trace.z.tolist() == [[0, 1, 2], [10, 11, 12]]
    assert "12 ± 0.5 nats" in trace.customdata[1][2]
    assert "7 sequences" in trace.customdata[1][2]


def test_a_head_that_was_not_measured_is_blank():
    frame = heads_frame(rows()[:-1])
    trace = head_map(frame, "entropy").data[0]
    assert np.isnan(trace.z[1, 2])
    assert trace.customdata[1][2] == "not measured"


def test_kinds_of_attention_are_chosen_from_a_menu():
    figure = head_map(heads_frame([*rows("cross"), *rows("self"), *rows("encoder")]), "entropy")
    labels = [button.label for button in figure.layout.updatemenus[0].buttons]
    assert labels == ["self-attention", "encoder self-attention", "cross-attention"]
    assert [trace.visible for trace in figure.data] == [True, False, False]


def test_values_of_both_signs_get_a_diverging_scale_about_zero():
    frame = heads_frame([(0, 0, "self", "distance", -2.0, 0.1, 3), (0, 1, "self", "distance", 1.0, 0.1, 3)])
    trace = head_map(frame, "distance").data[0]
    assert (trace.zmin, trace.zmax) == (-2.0, 2.0)


def test_an_unknown_metric_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="there are: entropy"):
        head_map(heads_frame(rows()), "nonsense")


def test_a_map_is_titled_and_coloured_as_its_analysis_declares():
    figure = head_map(declared("strength_5", Metric("Strength at 5", "N", "how much", -1.0, 100.0)), "strength_5")
    assert figure.layout.title.text == "Strength at 5"
    assert figure.layout.title.subtitle.text == "how much (N)"
    assert figure.data[0].colorbar.title.text == "N"
    assert (figure.data[0].zmin, figure.data[0].zmax) == (-1.0, 100.0)
    figure = head_map(declared("strength_5", Metric("Strength at 5", low=5.0, high=6.0)), "strength_5")
    assert (figure.data[0].zmin, figure.data[0].zmax) == (0.0, 12.0)


def test_rows_alone_and_what_is_not_declared_go_by_the_name_in_words():
    assert head_map(heads_frame(rows(metric="kept_at_10")), "kept_at_10").layout.title.text == "Kept at 10"
    found = Result("study", (), heads_frame(rows(metric="kept_at_10")), pd.DataFrame(), {})
    assert head_map(found, "kept_at_10").layout.title.text == "Kept at 10"


def test_what_a_declaration_says_is_text_and_no_markup():
    figure = head_map(declared("a", Metric("Rows with A < 1/N", "<b>", "A & B")), "a")
    assert figure.layout.title.text == "Rows with A &lt; 1/N"
    assert figure.layout.title.subtitle.text == "A &amp; B (&lt;b&gt;)"
    assert "&lt;b&gt;" in figure.data[0].customdata[0][0]


def test_metrics_stand_as_they_come_and_series_last_by_their_numbers():
    given = ["kept_10", "kept_20", "kept_5", "kept_0.5", "kept_1e-05", "share", "h2o_kept_5", "h2o_kept_10", "top_3"]
    assert in_order(given) == [
        "share", "top_3", "kept_1e-05", "kept_0.5", "kept_5", "kept_10", "kept_20", "h2o_kept_5", "h2o_kept_10",
    ]  # fmt: skip


def test_pooling_keeps_the_mean_and_leaves_missing_cells_out():
    values = np.arange(35.0).reshape(5, 7)
    pooled = pool_matrix(values, 2, 3)
    assert pooled.shape == (2, 3)
    assert pooled[0, 0] == values[:3, :3].mean()
    assert pooled[1, 2] == values[3:, 6:].mean()
    values[0, 0] = np.nan
    assert pool_matrix(values, 2, 3)[0, 0] == np.nanmean(values[:3, :3])


def test_quantising_errs_by_half_a_hundredth_of_the_range_at_most():
    values = np.random.default_rng(0).normal(size=(40, 50))
    levels, low, high = quantise(values)
    assert np.abs(low + levels * (high - low) / 100 - values).max() <= (high - low) / 200 + 1e-12


@pytest.mark.parametrize("holes", [False, True])
def test_a_matrix_of_2048_square_stays_under_half_a_megabyte(holes):
    values = np.random.default_rng(0).random((2048, 2048))
    if holes:
        values[:8] = np.nan
    figure = matrix_figure(values, "Attention", rows="query", columns="key")
    text = figure.to_json()
    assert len(text) < (500_000 if not holes else 1_800_000)
    assert figure.data[0].dx == 4


def test_a_small_matrix_is_shown_exactly():
    figure = matrix_figure(np.eye(3), "Attention", rows="query", columns="key")
    np.testing.assert_array_equal(figure.data[0].z, np.eye(3))


def test_a_profile_shows_layers_first_and_the_heads_of_a_layer_on_demand():
    values = np.arange(12.0).reshape(2, 2, 3)
    figure = profile(values, [0, 1, 2, 4], "Entropy", "by position", unit="nats")
    buttons = figure.layout.updatemenus[0].buttons
    assert [trace.name for trace in figure.data] == ["layer 0", "layer 1", "L0H0", "L0H1", "L1H0", "L1H1"]
    assert list(buttons[2].args[0]["visible"]) == [False, False, False, False, True, True]
    np.testing.assert_allclose(figure.data[0].y, values[0].mean(0))


def test_the_mean_of_a_layer_weighs_its_heads_by_their_rows():
    values, weights = np.array([[[1.0], [3.0]]]), np.array([[[3.0], [1.0]]])
    assert layer_means(values, weights).tolist() == [[1.5]]
    assert layer_means(np.array([[[1.0], [np.nan]]]), None).tolist() == [[1.0]]


def test_every_figure_is_plain_json():
    for figure in (head_map(heads_frame(rows()), "entropy"), top_bars(["a", "b"], [2.0, 1.0], "Top", "of all")):
        assert json.loads(figure.to_json())["data"]

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from attnlab.errors import AttnlabError, RunFolderError
from attnlab.results import Metric, NamedArray, Result, combine_heads, heads_frame, result_files


def example(analysis="study", metric="strength"):
    heads = heads_frame([(1, 0, "self", metric, 0.5, float("nan"), 1), (0, 1, "self", metric, 0.25, 0.1, 3)])
    array = NamedArray(
        np.arange(6, dtype=np.float64).reshape(2, 3).T, ("bin", "layer"), {"bin": [0, 1, 2, 5]}, "nats", "An array."
    )
    table = pd.DataFrame({"token": ["a", "</script>"], "count": [1, 2]})
    return Result(
        analysis, ("One sentence.",), heads, table, {"study.values": array, "empty": NamedArray(np.zeros(0), ("x",))}
    )


def test_what_is_saved_is_what_is_loaded(tmp_path):
    result = example()
    result.save(tmp_path)
    loaded = Result.load(tmp_path, "study")
    assert loaded.findings == result.findings
    pd.testing.assert_frame_equal(loaded.heads, combine_heads([result]))
    pd.testing.assert_frame_equal(loaded.table, result.table)
    array = loaded.arrays["study.values"]
    np.testing.assert_array_equal(array.values, result.arrays["study.values"].values)
    assert (array.axes, dict(array.coordinates), array.unit) == (("bin", "layer"), {"bin": [0, 1, 2, 5]}, "nats")
    assert loaded.arrays["empty"].values.shape == (0,)


METRICS = {
    "strength": Metric("Strength", "N", "A mean.", 0.0, 1.0),
    "a_first": Metric("Of α", high=2.5),
}


def test_what_metrics_are_called_is_kept_in_its_order(tmp_path):
    replace(example(), metrics=METRICS).save(tmp_path)
    loaded = Result.load(tmp_path, "study")
    assert list(loaded.metrics.items()) == list(METRICS.items())
    assert loaded.plot().layout.title.text == "Strength"


def test_a_result_of_an_earlier_version_opens_with_names_in_words(tmp_path):
    result = replace(example(metric="strength_at_5"), metrics={"strength_at_5": Metric("Strength at five")})
    result.save(tmp_path)
    path = tmp_path / "arrays" / "study.safetensors"
    with safe_open(path, framework="numpy") as file:
        about = json.loads(file.metadata()["attnlab"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del about["declared"]
    save_file(arrays, path, metadata={"attnlab": json.dumps(about)})
    loaded = Result.load(tmp_path, "study")
    assert loaded.metrics == {}
    assert loaded.plot().layout.title.text == "Strength at 5"


def test_a_metric_that_is_declared_by_a_title_alone_is_refused():
    with pytest.raises(ValueError, match=r"declared as 'Strength'; an attnlab\.results\.Metric"):
        Result("study", (), heads_frame([]), pd.DataFrame(), {}, metrics={"strength": "Strength"})


def test_a_further_table_whose_name_is_no_name_of_a_file_is_refused():
    with pytest.raises(ValueError, match="lower-case letters and underscores"):
        Result("study", (), heads_frame([]), pd.DataFrame(), {}, {"../massive": pd.DataFrame()})


def test_the_same_result_gives_the_same_bytes():
    assert result_files([example()]) == result_files([example()])


def test_saving_a_second_result_keeps_the_rows_of_the_first(tmp_path):
    example("one", "a").save(tmp_path)
    example("two", "b").save(tmp_path)
    example("one", "a").save(tmp_path)
    together = pd.read_parquet(tmp_path / "tables" / "heads.parquet")
    assert together["metric"].tolist() == ["a", "a", "b", "b"]
    assert together[["layer", "head"]].to_numpy().tolist()[:2] == [[0, 1], [1, 0]]
    files = result_files([example("two", "b"), example("one", "a")])
    assert files["tables/heads.parquet"] == (tmp_path / "tables" / "heads.parquet").read_bytes()


def test_the_arrays_describe_themselves(tmp_path):
    example().save(tmp_path)
    with safe_open(tmp_path / "arrays" / "study.safetensors", framework="numpy") as file:
        about = json.loads(file.metadata()["attnlab"])
    assert about["arrays"]["study.values"]["axes"] == ["bin", "layer"]
    assert about["metrics"] == ["strength"]


def test_tables_have_the_columns_of_the_design():
    assert list(example().to_frame().columns) == ["layer", "head", "kind", "metric", "value", "stderr", "n"]


@pytest.mark.parametrize("file", ["arrays/study.safetensors", "tables/study.parquet", "tables/heads.parquet"])
def test_a_missing_or_damaged_file_is_one_sentence(tmp_path, file):
    example().save(tmp_path)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(RunFolderError, match=path.name):
        Result.load(tmp_path, "study")
    path.unlink()
    with pytest.raises(RunFolderError, match="cannot be read"):
        Result.load(tmp_path, "study")


def test_axes_must_fit_the_values():
    with pytest.raises(ValueError, match="one name each"):
        NamedArray(np.zeros((2, 2)), ("layer",))
    with pytest.raises(ValueError, match="coordinates"):
        NamedArray(np.zeros(3), ("bin",), {"bin": [0]})


def test_an_analysis_that_is_not_installed_still_plots_its_metrics():
    result = example()
    assert list(result.figures()) == ["strength"]
    assert result.plot().data[0].z.shape == (2, 2)
    with pytest.raises(AttnlabError, match="Did you mean 'strength'"):
        result.plot("strenght")

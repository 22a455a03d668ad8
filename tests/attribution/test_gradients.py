"""Attribution patching against finite differences, and its sums against runs that are patched by hooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnlab import AttnlabError
from attnlab.attribution import activation_patching, attribution_patching, logit_difference

CLEAN = (torch.arange(30).view(3, 10) * 7 + 3) % 64
CORRUPTED = (torch.arange(30).view(3, 10) * 11 + 5) % 64
ANSWERS, WRONG = [5, 9, 60], [3, 2, 1]
METRIC = logit_difference(ANSWERS, WRONG)
FAMILIES = ["GPT2LMHeadModel", "GPTNeoXForCausalLM", "LlamaForCausalLM"]


def run(model, out, ids, edits=None):
    """The metric [3] and what the output projections received, after `edits` of that by layer."""
    received, handles = {}, []
    for layer, projection in enumerate(out):

        def before(module, args, layer=layer):
            received[layer] = (edits or {}).get(layer, lambda x: x)(args[0])
            return (received[layer],)

        handles.append(projection.register_forward_pre_hook(before))
    try:
        with torch.no_grad():
            last = model(ids).logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()
    return (last[range(3), ANSWERS] - last[range(3), WRONG]).numpy(), received


def slope_by_differences(model, out, base, source, layer, head, position, share, all_heads):
    """d metric / d share of one head's z at one position, on the way from z' to z of its layer or of itself."""
    mine = slice(head * 8, head * 8 + 8)
    way = source[layer] - base[layer]

    def at(step):
        def edit(x):
            x = x.clone()
            moved = base[layer] + share * way
            x[..., slice(None) if all_heads else mine] = moved[..., slice(None) if all_heads else mine]
            x[:, position, mine] += step * way[:, position, mine]
            return x

        return run(model, out, CORRUPTED, {layer: edit})[0]

    # Llama's norms are computed in float32, so its step is larger.
    step = 1e-5 if "Llama" not in type(model).__name__ else 1e-2
    return (at(step) - at(-step)) / (2 * step)


@pytest.mark.parametrize("path", ["layer", "head"])
@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_mean_slopes_taken_by_finite_differences(tiny, projections, name, path):
    model = tiny(name)
    out = projections(name, model)
    (_, base), (_, source) = run(model, out, CORRUPTED), run(model, out, CLEAN)
    found = attribution_patching(model, CLEAN, CORRUPTED, METRIC, steps=2, path=path).arrays["change"].values
    assert found.shape == (3, 2, 4, 10)
    for layer, head, position in ((0, 1, 4), (0, 3, 9), (1, 2, 9)):
        slopes = [
            slope_by_differences(model, out, base, source, layer, head, position, share, path == "layer")
            for share in (0.5, 1.0)
        ]
        tolerance = 1e-7 if name != "LlamaForCausalLM" else 1e-3
        scale = np.abs(slopes).max()
        assert scale > 1e-3
        assert np.allclose(found[:, layer, head, position], np.mean(slopes, 0), atol=tolerance * max(scale, 1))


def test_plain_attribution_patching_is_exact_for_small_changes(tiny, projections):
    model = tiny("GPT2LMHeadModel")
    out = projections("GPT2LMHeadModel", model)
    base_values, base = run(model, out, CORRUPTED)
    _, source = run(model, out, CLEAN)
    plain = attribution_patching(model, CLEAN, CORRUPTED, METRIC, steps=1, rule="left").arrays["change"].values
    small = 1e-6
    for layer in range(2):
        moved = {layer: lambda x, layer=layer: base[layer] + small * (source[layer] - base[layer])}
        change = (run(model, out, CORRUPTED, moved)[0] - base_values) / small
        assert np.allclose(plain[:, layer].sum((1, 2)), change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_many_steps_sum_to_the_effect_along_the_path(tiny, direction):
    model = tiny("GPT2LMHeadModel")
    options = {"direction": direction, "batch_size": 120}
    layers = activation_patching(model, CLEAN, CORRUPTED, METRIC, each="layer", **options)
    heads = activation_patching(model, CLEAN, CORRUPTED, METRIC, **options)
    base = layers.arrays["corrupted" if direction == "denoise" else "clean"].values
    for path, expected in (("layer", layers), ("head", heads)):
        errors = []
        for steps in (10, 40):
            found = attribution_patching(
                model, CLEAN, CORRUPTED, METRIC, steps=steps, rule="midpoint", path=path, **options
            )
            change = found.arrays["change"].values.sum(-1)
            change = change.sum(-1) if path == "layer" else change.reshape(3, 8)
            errors.append(np.abs(change.T - (expected.arrays["metric"].values - base)).max())
        # The midpoint rule's error falls with the square of the number of steps.
        assert errors[1] < 0.2 * errors[0]
        assert errors[1] < 2e-2
    assert np.allclose(found.table["effect"], heads.table["effect"], atol=2e-2)


def test_moving_the_inputs_is_integrated_along_the_embeddings(tiny, projections):
    model = tiny("GPT2LMHeadModel")
    out = projections("GPT2LMHeadModel", model)
    (_, base), (_, source) = run(model, out, CORRUPTED), run(model, out, CLEAN)
    found = attribution_patching(model, CLEAN, CORRUPTED, METRIC, steps=2, path="inputs", batch_size=4)
    embeddings = [model.transformer.wte(ids) for ids in (CORRUPTED, CLEAN)]
    step, layer, head, position = 1e-5, 0, 2, 5
    mine, slopes = slice(16, 24), []
    for share in (0.5, 1.0):
        values = []
        for sign in (1, -1):

            def edit(x, sign=sign):
                x = x.clone()
                x[:, position, mine] += sign * step * (source[layer] - base[layer])[:, position, mine]
                return x

            moving = embeddings[0] + share * (embeddings[1] - embeddings[0])
            handle = model.transformer.wte.register_forward_hook(lambda m, a, o, moving=moving: moving)
            values.append(run(model, out, CORRUPTED, {layer: edit})[0])
            handle.remove()
        slopes.append((values[0] - values[1]) / (2 * step))
    assert np.abs(slopes).max() > 1e-3
    assert np.allclose(found.arrays["change"].values[:, layer, head, position], np.mean(slopes, 0), atol=1e-7)


@pytest.mark.parametrize("path", ["layer", "head", "inputs"])
def test_batches_and_chosen_heads_change_nothing(tiny, path):
    model = tiny("GPT2LMHeadModel").requires_grad_(True)
    whole = attribution_patching(model, CLEAN, CORRUPTED, METRIC, path=path, batch_size=64)
    pieces = attribution_patching(model, CLEAN, CORRUPTED, METRIC, path=path, batch_size=2)
    assert np.allclose(whole.arrays["change"].values, pieces.arrays["change"].values, atol=1e-9)
    assert all(parameter.grad is None for parameter in model.parameters())
    if path != "layer":
        some = attribution_patching(model, CLEAN, CORRUPTED, METRIC, path=path, heads=["L1H0", "L1H2"])
        change = some.arrays["change"].values
        assert np.allclose(change[:, 1, [0, 2]], whole.arrays["change"].values[:, 1, [0, 2]], atol=1e-9)
        assert np.isnan(change[:, 0]).all()
        assert some.table[["layer", "head"]].to_numpy().tolist() == [[1, 0], [1, 2]]


def test_the_table_sums_over_positions_or_names_them(tiny):
    model = tiny("LlamaForCausalLM")
    whole = attribution_patching(model, CLEAN, CORRUPTED, METRIC)
    each = attribution_patching(model, CLEAN, CORRUPTED, METRIC, positions="each")
    assert len(whole.table) == 8
    assert len(each.table) == 80
    assert np.allclose(each.table.groupby(["layer", "head"])["effect"].sum(), whole.table["effect"])
    assert whole.heads["metric"].unique().tolist() == ["attribution_patching"]
    assert each.heads.equals(whole.heads)
    span = whole.arrays["clean"].values - whole.arrays["corrupted"].values
    assert whole.table["effect"].iloc[3] == pytest.approx(whole.table["change"].iloc[3] / span.mean())


def test_what_does_not_fit_is_one_sentence(tiny):
    model = tiny("GPT2LMHeadModel")
    wrong = [
        (ValueError, "steps is 0", {"steps": 0}),
        (ValueError, "rule is 'up'; expected one of right, midpoint, left", {"rule": "up"}),
        (ValueError, "path is 'all'", {"path": "all"}),
        (ValueError, r"positions is \[1\]", {"positions": [1]}),
        (AttnlabError, "the model has 4 heads there", {"heads": "L0H4"}),
    ]
    for kind, message, options in wrong:
        with pytest.raises(kind, match=message):
            attribution_patching(model, CLEAN, CORRUPTED, METRIC, **options)

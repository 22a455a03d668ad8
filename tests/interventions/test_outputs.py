"""Edits of z: logits are those of a dense float64 computation with z edited by hand."""

from __future__ import annotations

import pytest
import torch
from attnlab_kernels import Emit

from attnlab.capture import Head, capture
from attnlab.errors import AttnlabError
from attnlab.interventions import Ablate, Patch, Replace, Scale, mean_outputs
from attnlab.models import load_model
from attnlab.runs.analysis import Batch

IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(2))
OTHER = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(3))
LEFT = torch.ones_like(IDS)
LEFT[1, :3] = 0


def put(layer, heads, positions, value):
    """An edit of z at some heads and positions."""

    def apply(at, z):
        if at != layer:
            return z
        z, new = z.clone(), value(z).expand_as(z)
        for head in heads:
            z[:, head, positions] = new[:, head, positions]
        return z

    return apply


def run(model, *interventions, **inputs):
    with torch.no_grad(), capture(model, interventions=interventions):
        return model(**{"input_ids": IDS, **inputs}).logits


def record(model, **inputs):
    with torch.no_grad(), capture(model, qkv=True) as session:
        model(**{"input_ids": OTHER, **inputs})
    return session


def same(found, expected):
    # Without statistics other heads are the model's own `sdpa`, in float64.
    return bool((found - expected).abs().max() < 1e-9 * expected.abs().max())


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM"])
def test_zero_ablation_and_scaling(tiny, dense, name):
    model = tiny(name)
    expected = dense(z=put(0, [1, 2], [4, 11], lambda z: 0 * z)).run(model, input_ids=IDS)
    assert same(run(model, Ablate(["L0H1", Head(0, 2)], positions=[4, -1])), expected)
    expected = dense(z=put(1, [0, 1, 2, 3], range(12), lambda z: -0.5 * z)).run(model, input_ids=IDS)
    assert same(run(model, Scale("L1", -0.5)), expected)


def test_mean_ablation_over_a_reference_set(tiny, dense):
    model = tiny("LlamaForCausalLM")
    data = [{"input_ids": OTHER, "attention_mask": LEFT}, IDS[:1, :5]]
    edits = dense(), dense()
    edits[0].run(model, input_ids=OTHER, attention_mask=LEFT)
    edits[1].run(model, input_ids=IDS[:1, :5])
    z, short = edits[0].outputs[1], edits[1].outputs[1]
    tokens = torch.cat([z[0], z[1][:, 3:], short[0]], 1)
    means = mean_outputs(model, data)
    assert torch.allclose(means["self", 1], tokens.mean(1), atol=1e-12)
    by_position = mean_outputs(model, data, by_position=True)["self", 1]
    assert by_position.shape == (4, 12, 8)
    assert torch.allclose(by_position[:, 4], (z[0, :, 4] + z[1, :, 4] + short[0, :, 4]) / 3, atol=1e-12)
    assert torch.allclose(by_position[:, 1], (z[0, :, 1] + short[0, :, 1]) / 2, atol=1e-12)
    for mean, value in ((means, tokens.mean(1)[None, :, None]), ({1: by_position}, by_position[None])):
        expected = dense(z=put(1, [3], range(12), lambda z, value=value: value)).run(model, input_ids=IDS)
        assert same(run(model, Ablate("L1H3", mean)), expected)


def test_means_of_a_loaded_model_over_batches(tiny_checkpoint_of_ids):
    model = load_model(tiny_checkpoint_of_ids, device="cpu")
    ids = torch.arange(12).view(2, 6)
    batch = Batch((0, 1), ids, torch.ones_like(ids, dtype=torch.bool))
    assert torch.allclose(mean_outputs(model, [batch])["self", 0], mean_outputs(model.hf, [ids])["self", 0])
    with pytest.raises(AttnlabError, match="got no data"):
        mean_outputs(model, [])


def test_patching_from_another_run(tiny, dense):
    model = tiny("LlamaForCausalLM")
    session, edit = record(model), dense()
    edit.run(model, input_ids=OTHER)
    for layer, heads, positions in ((0, [0, 2], [3]), (1, [1], range(12))):
        value = edit.outputs[layer]
        expected = dense(z=put(layer, heads, positions, lambda z, value=value: value)).run(model, input_ids=IDS)
        where = None if len(positions) == 12 else list(positions)
        by_head = {Head(layer, h): value[:, h] for h in heads}
        for source in (session, session.calls, {layer: value}, {("self", layer): value}, by_head):
            assert same(run(model, Patch({layer: heads}, source, positions=where)), expected)


def test_one_recorded_row_serves_all_rows_and_rows_can_be_chosen(tiny, dense):
    model = tiny("LlamaForCausalLM")
    session, edit = record(model, input_ids=OTHER[:1]), dense()
    edit.run(model, input_ids=OTHER[:1])

    def second_row(z):
        return torch.cat([z[:1], edit.outputs[0]])

    expected = dense(z=put(0, [0, 1, 2, 3], range(12), second_row)).run(model, input_ids=IDS)
    assert same(run(model, Ablate("L0", session, rows=[1])), expected)
    positions = torch.tensor([[2, 3], [5, -1]])
    value = torch.zeros(2, 1, 12, 1, dtype=torch.bool)
    value[0, :, [2, 3]] = value[1, :, [5, 11]] = True
    chosen = dense(z=lambda layer, z: z * ~value if layer == 1 else z).run(model, input_ids=IDS)
    assert same(run(model, Ablate("L1", positions=positions)), chosen)


def test_a_recorded_generation_is_patched_by_position(tiny):
    model = tiny("LlamaForCausalLM")
    whole = record(model)
    with torch.no_grad(), capture(model, qkv=True) as pieces:
        cache = model(OTHER[:, :7], use_cache=True).past_key_values
        model(OTHER[:, 7:], past_key_values=cache)
    for positions in (None, [6, 7, 8]):
        one, other = (run(model, Patch("L1H2", source, positions=positions)) for source in (whole, pieces))
        assert torch.allclose(one, other, atol=1e-9)


def test_patching_a_run_with_itself_changes_nothing_and_gradients_reach_the_source(tiny):
    model = tiny("GPT2LMHeadModel")  # whose norms, unlike Llama's, are in float64, so differences are exact
    source = record(model, input_ids=IDS)
    assert torch.allclose(run(model, Patch("all", source)), run(model), atol=1e-12)

    def loss(z):
        with capture(model, interventions=[Patch("L0H1", {0: z}, positions=[5])]):
            return model(IDS).logits[:, -1].square().mean()

    z = source.calls[0].z.detach().clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(z), z)
    elsewhere = gradient.clone()
    elsewhere[:, 1, 5] = 0
    assert elsewhere.abs().max() == 0
    step = 1e-6 * torch.randn(z.shape, generator=torch.Generator().manual_seed(7)).double()
    with torch.no_grad():
        slope = (loss(z + step) - loss(z - step)) / 2
    assert torch.allclose(slope, (gradient * step).sum(), rtol=1e-5)


def test_head_importances_are_gradients_of_a_table_of_scales(tiny):
    model = tiny("GPT2LMHeadModel")
    gates = torch.ones(2, 4, dtype=torch.double, requires_grad=True)
    with capture(model, interventions=[Scale("all", gates)]):
        loss = model(IDS).logits.square().mean()
    (gradient,) = torch.autograd.grad(loss, gates)
    for layer, head in ((0, 1), (1, 3)):
        up, down = (run(model, Scale(Head(layer, head), 1 + d)).square().mean() for d in (1e-6, -1e-6))
        assert torch.allclose((up - down) / 2e-6, gradient[layer, head], rtol=1e-5)


def test_z_becomes_a_function_of_the_heads_together_or_apart(tiny, dense):
    model = tiny("LlamaForCausalLM")
    mix = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)).double()
    small = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).double()

    def together(z):
        new = torch.relu(torch.cat([z[:, 1], z[:, 3]], -1) @ mix)
        z = z.clone()
        z[:, 1], z[:, 3] = new[..., :8], new[..., 8:]
        return z

    expected = dense(z=put(1, [1, 3], range(12), together)).run(model, input_ids=IDS)
    assert same(run(model, Replace(["L1H1", "L1H3"], lambda z: torch.relu(z @ mix))), expected)
    expected = dense(z=put(1, [1, 3], range(12), lambda z: z @ small)).run(model, input_ids=IDS)
    assert same(run(model, Replace(["L1H1", "L1H3"], lambda z: z @ small, by_head=True)), expected)


def test_the_recorded_z_is_the_edited_one(tiny):
    model = tiny("LlamaForCausalLM")
    with capture(model, emit=Emit(entropy=True), qkv=True, interventions=[Ablate("L1H0")]) as session:
        model(IDS)
    assert session.calls[1].z[:, 0].abs().max() == 0
    assert session.calls[1].z[:, 1].abs().min() > 0


def test_what_is_not_recorded_or_does_not_fit_is_one_sentence(tiny):
    model = tiny("LlamaForCausalLM")
    with torch.no_grad(), capture(model, emit=Emit(entropy=True)) as bare:
        model(IDS)
    with torch.no_grad(), capture(model, qkv=True) as twice:
        model(IDS)
        model(IDS)
    short = record(model, input_ids=OTHER[:, :5])
    wrong = {
        "capture with qkv=True": lambda: Patch("L0", bare),
        "of several runs": lambda: Patch("L0", twice),
        "got no recorded z": lambda: Patch("L0", []),
        "got no z of position 5 of self layer 0": lambda: run(model, Patch("L0", short)),
        "got no z of self L1H2": lambda: run(model, Patch("L1H2", {"L1H1": torch.zeros(8)})),
        "got z of 3 heads for layer 1's 4": lambda: run(model, Patch("L1", {1: torch.zeros(3, 8)})),
        "got z of 1 batch rows and 7 columns": lambda: run(model, Patch("L1", {1: torch.zeros(4, 7)})),
        "returned shape .* expected \\[2, 12, 8\\]": lambda: run(model, Replace("L0H1", lambda z: z[:, :3])),
    }
    for message, attempt in wrong.items():
        with pytest.raises(AttnlabError, match=message):
            attempt()
    with pytest.raises(ValueError, match=r"expected \[Hq, Dv\]"):
        Patch("L1", {1: torch.zeros(8)})

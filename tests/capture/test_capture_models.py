"""Every architecture computes what it computed before, and its statistics are those of its own attention matrices."""

from __future__ import annotations

import pytest
import torch
from attnlab_kernels import Emit

from attnlab import errors
from attnlab.capture import capture

CAUSAL = [
    "GPT2LMHeadModel", "LlamaForCausalLM", "MistralForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
    "GptOssForCausalLM", "Llama4ForCausalLM", "DeepseekV3ForCausalLM", "OPTForCausalLM",
]  # fmt: skip
ENCODERS = ["BertForMaskedLM", "RobertaForMaskedLM", "AlbertForMaskedLM", "ModernBertForMaskedLM"]
PAIRS = ["T5ForConditionalGeneration", "BartForConditionalGeneration"]
SILENT = ["BloomForCausalLM", "FalconForCausalLM", "GPTJForCausalLM", "DebertaV2ForMaskedLM"]
STATISTICS = Emit(entropy=True, max_probability=True, key_sum=True)


def batch(padding, pair):
    """Two sequences of which one is padded on a side, or none is."""
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding == "right":
        mask[1, 8:] = 0
    if padding == "left":
        mask[1, :4] = 0
    inputs = {"input_ids": ids} | ({} if padding == "none" else {"attention_mask": mask})
    if pair:
        inputs["decoder_input_ids"] = ids[:, :9]
        if padding == "right":
            inputs["decoder_attention_mask"] = mask[:, :9]
    rows = {"self": mask, "encoder": mask, "cross": mask}
    if pair:
        real = inputs.get("decoder_attention_mask", torch.ones(2, 9))
        rows = {"encoder": mask, "self": real, "cross": real}
    return inputs, {kind: m.bool() for kind, m in rows.items()}


@pytest.mark.parametrize("name", CAUSAL + ENCODERS + PAIRS)
def test_logits_are_the_models_own_and_statistics_those_of_its_matrices(tiny, eager_matrices, name):
    model, pair = tiny(name), name in PAIRS
    paddings = ("right",) if name in ENCODERS else ("none", "right") if pair else ("right", "left")
    for padding in paddings:
        inputs, rows = batch(padding, pair)
        with torch.no_grad():
            own = model(**inputs).logits
            with capture(model, emit=STATISTICS) as session:
                read = model(**inputs).logits
        real = rows["self"]
        assert (own - read)[real].abs().max() < 2e-5 * own.std()
        matrices = eager_matrices(model, **inputs)
        seen = {kind: len(layers) for kind, layers in matrices.items()}
        assert {kind: sum(c.kind == kind for c in session.calls) for kind in seen} == seen
        for call in session.calls:
            pattern, counts = matrices[call.kind][call.layer], rows[call.kind]
            # What a learned sink takes has no column of its own, and is part of the entropy.
            sink = (1 - pattern.sum(-1)).clamp(min=0)
            entropy = torch.special.entr(pattern).sum(-1)
            if name.startswith("GptOss"):
                entropy += torch.special.entr(sink)
            keep = counts[:, None].expand_as(entropy)
            assert torch.allclose(call.emitted.entropy.double()[keep], entropy[keep], atol=5e-5)
            assert torch.allclose(call.emitted.max_probability.double()[keep], pattern.amax(-1)[keep], atol=5e-5)
            sums = (pattern * counts[:, None, :, None]).sum(2)
            assert torch.allclose(call.emitted.key_sum.double(), sums[..., : call.site.n_keys], atol=5e-5)
            padded = None if bool(counts.all()) else counts
            assert (call.site.query_mask is None) == (padded is None)
            if padded is not None:
                assert torch.equal(call.site.query_mask, padded)


@pytest.mark.parametrize("name", SILENT)
def test_a_model_that_does_not_dispatch_is_refused_by_name(tiny, name):
    model = tiny(name)
    with (
        torch.no_grad(),
        pytest.raises(errors.UnsupportedModelError, match=name),
        capture(model, emit=STATISTICS),
    ):
        model(torch.tensor([[3, 4, 5]]))


def test_layers_that_share_one_module_are_numbered_by_their_calls(tiny):
    model = tiny("AlbertForMaskedLM", num_hidden_layers=3)
    with torch.no_grad(), capture(model, emit=STATISTICS) as session:
        for _ in range(2):
            model(torch.tensor([[3, 4, 5]]))
    assert [call.layer for call in session.calls] == [0, 1, 2, 0, 1, 2]


def test_grouped_key_heads_are_handed_over_ungrouped(tiny):
    with torch.no_grad(), capture(model := tiny("LlamaForCausalLM"), qkv=True) as session:
        model(torch.tensor([[3, 4, 5]]))
    call = session.calls[0]
    assert (call.site.n_heads, call.site.n_key_heads) == (4, 2)
    assert call.q.shape == (1, 4, 3, 8)
    assert call.k.shape == call.v.shape == (1, 2, 3, 8)
    assert call.z.shape == (1, 4, 3, 8)


def test_half_precision_errs_no_more_than_the_models_own(tiny):
    ids = torch.arange(3, 15)[None]
    model = tiny("LlamaForCausalLM").to(torch.bfloat16)
    with torch.no_grad():
        own = model(ids).logits.float()
        with capture(model, emit=STATISTICS):
            read = model(ids).logits.float()
        exact = model.float()(ids).logits
    assert (read - exact).abs().max() <= 2 * (own - exact).abs().max() + 0.01 * exact.std()


def test_generation_with_a_cache_is_unchanged(tiny):
    model = tiny("LlamaForCausalLM")
    ids = torch.tensor([[3, 4, 5, 6]])
    own = model.generate(ids, min_new_tokens=5, max_new_tokens=5, do_sample=False)
    with capture(model, emit=STATISTICS) as session:
        read = model.generate(ids, min_new_tokens=5, max_new_tokens=5, do_sample=False)
    assert torch.equal(own, read)
    lengths = [(c.site.n_queries, c.site.n_keys) for c in session.calls if c.layer == 0]
    assert lengths[:3] == [(4, 4), (1, 5), (1, 6)]

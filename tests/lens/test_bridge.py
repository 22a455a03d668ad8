"""TransformerBridge over many families: statistics, outputs and hooks, however the wrapped model computes attention.

Some of its components write attention out, others leave it to transformers, which may dispatch it or not; GPT-J,
GPT-Neo and BLOOM, whose own attention never dispatches, can be read in a bridge.
"""

from __future__ import annotations

import pytest
import torch
from attnlab_kernels import Emit

from attnlab.capture import capture
from attnlab.errors import AttnlabWarning, UnsupportedModelError

pytest.importorskip("transformer_lens")

IDS = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(1))
LEFT = torch.ones_like(IDS)
LEFT[0, :3] = 0
EMIT = Emit(entropy=True, max_probability=True, collision=True, key_sum=True)
STACKS = {"self": "blocks", "encoder": "encoder_blocks", "cross": "decoder_blocks"}
# Where their adapter does not ask for eager attention, these bridges keep the sdpa of the model that they are given.
LEFT_TO_SDPA = ["GPT2", "Llama", "Mistral", "NeoX", "Phi", "Phi3", "OPT", "BERT", "BART"]


def unformed(name):
    return "pattern" not in name and "attn_scores" not in name


def inputs_of(model, padded):
    given = {"attention_mask": LEFT} if padded else {}
    if model.original_model.config.is_encoder_decoder:
        given["decoder_input_ids"] = IDS[:, :7]
    return given


def worst(a, b):
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max() for name in a)


def check(model, padded, check_statistics, tolerance=2e-5):
    inputs = inputs_of(model, padded)
    with torch.no_grad():
        logits, cache = model.run_with_cache(IDS, **inputs)
        _, filtered = model.run_with_cache(IDS, names_filter=unformed, **inputs)
        with capture(model, emit=EMIT) as session:
            read = model(IDS, **inputs)
        with capture(model, emit=EMIT) as formed_session:
            formed, formed_cache = model.run_with_cache(IDS, **inputs)
        with capture(model, emit=EMIT):
            _, unformed_cache = model.run_with_cache(IDS, names_filter=unformed, **inputs)
    assert (read - logits).abs().max() < tolerance
    assert (formed - logits).abs().max() < tolerance
    assert worst(dict(formed_cache), dict(cache)) < tolerance
    assert worst(dict(unformed_cache), dict(filtered)) < tolerance
    places = {(call.kind, call.layer) for call in session.calls}
    assert len(places) == len(session.calls) == len(formed_session.calls)
    for call in (*session.calls, *formed_session.calls):
        stack = "decoder_blocks" if "encoder_blocks.0.hook_in" in cache and call.kind == "self" else STACKS[call.kind]
        part = {"cross": "cross_attn", "encoder": "attn"}.get(call.kind, "attn" if stack == "blocks" else "self_attn")
        name = f"{stack}.{call.layer}.{part}.hook_pattern"
        if name in cache:
            check_statistics(call.emitted, cache[name], 5e-6, call.site.query_mask)
    return session, cache


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "left"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_family(bridge, check_statistics, family, padded):
    model = bridge(family)
    session, cache = check(model, padded, check_statistics)
    assert sum(name.endswith("hook_pattern") for name in cache) == len(session.calls) == (6 if family == "BART" else 2)
    assert model.original_model.config._attn_implementation == "eager"
    decoder = [call for call in session.calls if call.kind == "self"]
    assert all(call.site.causal == (family != "BERT") for call in decoder)
    if family not in ("GPTNeo", "MPT"):
        masks = {None if call.site.query_mask is None else call.site.query_mask.shape[1] for call in decoder}
        assert masks == ({12} if padded and family != "BART" else {None})


@pytest.mark.parametrize("padded", [False, True], ids=["unpadded", "left"])
@pytest.mark.parametrize("name", LEFT_TO_SDPA)
def test_bridges_over_sdpa(bridge, check_statistics, name, padded):
    model = bridge(name, "sdpa")
    session, _ = check(model, padded, check_statistics)
    assert len(session.calls) == (6 if name == "BART" else 2)
    assert model.original_model.config._attn_implementation == "sdpa"


def test_key_heads_and_windows_are_known(bridge):
    for name, heads, windows in (("Mistral", 2, [4, 4]), ("Gemma2", 2, [4, None]), ("Falcon", 1, [None, None])):
        with torch.no_grad(), capture(bridge(name), qkv=True) as session:
            session.model(IDS)
        assert [call.site.window for call in session.calls] == windows
        assert {(call.site.n_key_heads, call.k.shape[1], call.v.shape[1]) for call in session.calls} == {(heads,) * 3}


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Gemma2"])
def test_generation_with_a_cache(bridge, name):
    model = bridge(name)
    options = {"max_new_tokens": 4, "do_sample": False, "verbose": False, "stop_at_eos": False}
    with torch.no_grad():
        own = model.generate(IDS[:1, :6], **options)
        with capture(model, emit=EMIT) as session:
            assert torch.equal(model.generate(IDS[:1, :6], **options), own)
    sites = [(call.site.n_queries, call.site.n_keys, call.site.query_offset) for call in session.calls if call.layer]
    assert sites == [(6, 6, 0), (1, 7, 6), (1, 8, 7), (1, 9, 8)]


def test_compatibility_mode(bridge, check_statistics):
    model = bridge("GPT2")
    model.enable_compatibility_mode(disable_warnings=True)
    inputs = {"attention_mask": LEFT}
    with torch.no_grad():
        logits, cache = model.run_with_cache(IDS, **inputs)
        with capture(model, emit=EMIT) as session:
            read, again = model.run_with_cache(IDS, names_filter=unformed, **inputs)
    assert (read - logits).abs().max() < 2e-5
    assert max((again[name] - cache[name]).abs().max() for name in again) < 2e-5
    for call in session.calls:
        check_statistics(call.emitted, cache[f"blocks.{call.layer}.attn.hook_pattern"], 5e-6, LEFT.bool())


def test_switches_of_the_bridge_keep_their_hooks(bridge):
    model = bridge("Llama")
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    with torch.no_grad():
        logits, cache = model.run_with_cache(IDS)
        with capture(model, emit=EMIT) as session:
            read, again = model.run_with_cache(IDS, names_filter=unformed)
    assert any(name.endswith("hook_result") for name in again)
    assert (read - logits).abs().max() < 2e-5
    assert max((again[name] - cache[name]).abs().max() for name in again) < 2e-5
    assert [call.site.n_key_heads for call in session.calls] == [2, 2]


def test_a_mask_that_is_no_closed_form_is_said(bridge):
    with torch.no_grad(), capture(bridge("GPTNeo"), emit=EMIT) as session:
        session.model(IDS)  # 144 bytes are not worth a word
    long = torch.randint(3, 50, (1, 4200))
    model = bridge("Llama")
    whole = torch.ones(1, 1, 4200, 4200, dtype=torch.bool).tril()
    whole[..., 7] = False
    with (
        torch.no_grad(),
        pytest.warns(AttnlabWarning, match="for every query and key by itself"),
        capture(model, emit=Emit(lse=True)) as session,
    ):
        model(long[:, :4200], attention_mask=torch.zeros(whole.shape).masked_fill(~whole, torch.finfo().min))


def test_bool_masks_added_as_numbers_are_refused(bridge):
    # DeepSeek's component adds its mask, which under sdpa is of booleans.
    model = bridge("DeepSeekV3", "sdpa")
    with (
        torch.no_grad(),
        pytest.raises(UnsupportedModelError, match=r"blocks.0.attn, MLAAttentionBridge"),
        capture(model),
    ):
        model(IDS, attention_mask=LEFT)

"""Whatever mask a model asks for or is given, capture computes with it: none is dropped."""

from __future__ import annotations

import warnings

import pytest
import torch
from attnlab_kernels import Emit
from transformers import DynamicCache, StaticCache

from attnlab.capture import capture

EMIT = Emit(entropy=True, key_sum=True)
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(2))


def both(model, **inputs):
    """Logits of the model by itself, and while captured; the calls; and whether a warning was given."""
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        own = model(**inputs).logits
        with capture(model, emit=EMIT) as session:
            read = model(**inputs).logits
    return own, read, session.calls, [w for w in caught if "no closed form" in str(w.message)]


def agree(own, read):
    return bool((own - read).abs().max() < 2e-5 * own.std())


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM", "Llama4ForCausalLM"])
def test_packed_position_ids_are_segments(tiny, name):
    model = tiny(name)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]] * 2)
    own, read, calls, warned = both(model, input_ids=IDS, position_ids=positions, use_cache=False)
    with torch.no_grad():
        unpacked = model(IDS, position_ids=torch.arange(12)[None], use_cache=False).logits
    assert (own - unpacked).abs().max() > 0.1  # packing does change this model
    assert agree(own, read)
    assert not warned
    assert calls[-1].emitted.entropy[:, :, 7].abs().max() < 1e-6  # the second document's first token sees itself alone


def test_boundaries_of_packed_documents_count_where_flash_attention_reads_them(tiny):
    model = tiny("LlamaForCausalLM")
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]])
    ends = torch.tensor([0, 7, 12], dtype=torch.int32)
    with torch.no_grad():
        own, unpacked = model(IDS[:1], position_ids=positions, use_cache=False).logits, model(IDS[:1]).logits
        packed = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 7, "max_length_k": 7}
        with capture(model, emit=EMIT):
            ignored = model(IDS[:1], **packed).logits
        # No flash attention is installed; what is read here is what a model that uses it would hand over.
        model.config._attn_implementation_internal = "flash_attention_2"
        with capture(model, emit=EMIT):
            read = model(IDS[:1], position_ids=positions, attention_mask=torch.ones(1, 12), use_cache=False, **packed)
    assert agree(unpacked, ignored)
    assert agree(own, read.logits)


def test_a_static_cache_is_read_up_to_the_last_query(tiny):
    model = tiny("LlamaForCausalLM")
    with torch.no_grad():
        own = model(IDS, past_key_values=StaticCache(model.config, max_cache_len=32)).logits
        with capture(model, emit=EMIT) as session:
            read = model(IDS, past_key_values=StaticCache(model.config, max_cache_len=32)).logits
    assert agree(own, read)
    assert session.calls[0].emitted.key_sum.shape == (2, 4, 12)


@pytest.mark.parametrize("kind", [StaticCache, DynamicCache])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM"])
def test_a_second_piece_continues_a_cache(tiny, name, kind):
    model = tiny(name)

    def run():
        cache = kind(config=model.config, **({"max_cache_len": 32} if kind is StaticCache else {}))
        model(IDS[:, :7], past_key_values=cache)
        return model(IDS[:, 7:], past_key_values=cache).logits

    with torch.no_grad():
        own, whole = run(), model(IDS).logits[:, 7:]
        with capture(model, emit=EMIT) as session:
            read = run()
    assert agree(own, read)
    assert agree(whole, read)
    assert session.calls[-1].site.query_offset + 5 == session.calls[-1].site.n_keys


@pytest.mark.parametrize("left", [0, 3])
def test_chunked_attention_is_segments(tiny, left):
    model = tiny("Llama4ForCausalLM")
    mask = torch.ones_like(IDS)
    mask[1, :left] = 0
    own, read, calls, warned = both(model, input_ids=IDS, attention_mask=mask)
    assert agree(own[mask.bool()], read[mask.bool()])
    assert not warned
    starts = calls[0].emitted.entropy[1, :, left::4]
    assert starts.abs().max() < 1e-6  # the first token of a chunk sees itself alone


def test_a_users_boolean_mask_is_kept(tiny):
    model = tiny("LlamaForCausalLM")
    mask = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(3)) < 0.5
    mask = mask | torch.eye(12, dtype=torch.bool)
    own, read, calls, warned = both(model, input_ids=IDS, attention_mask=mask)
    assert agree(own, read)
    assert len(warned) == 1
    assert not calls[0].site.causal
    hidden = calls[0].emitted.key_sum[:, :, -1] * ~mask[:, :, :, -1].any(2)
    assert hidden.abs().max() == 0


@pytest.mark.parametrize("hidden", [float("-inf"), torch.finfo(torch.float32).min, -1e9])
def test_a_users_additive_mask_is_kept(tiny, hidden):
    model = tiny("LlamaForCausalLM")
    seen = torch.ones(12, 12, dtype=torch.bool).tril()
    soft = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(4))
    for additive in (torch.zeros(2, 1, 12, 12), soft):
        mask = additive.masked_fill(~seen, hidden)
        own, read, calls, _ = both(model, input_ids=IDS, attention_mask=mask)
        assert agree(own, read)
        assert calls[0].emitted.entropy[:, :, 0].abs().max() < 1e-6
        assert calls[0].site.causal == (additive.shape[1] == 1)
        assert calls[0].emitted.key_count[0, 0].tolist() == list(range(12, 0, -1))


def test_rows_that_an_additive_mask_hides_whole_are_computed_but_do_not_count(tiny):
    model = tiny("LlamaForCausalLM")
    mask = torch.zeros(2, 1, 12, 12).masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(), torch.finfo().min)
    mask[:, :, 5] = torch.finfo().min
    own, read, calls, _ = both(model, input_ids=IDS, attention_mask=mask)
    assert agree(own, read)
    assert calls[0].site.query_mask.sum(1).tolist() == [11, 11]


@pytest.mark.parametrize("name", ["BertForMaskedLM", "ModernBertForMaskedLM"])
def test_an_encoders_four_dimensional_mask_is_kept(tiny, name):
    model = tiny(name)
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool)
    mask[1, :, :, 9:] = False
    if name == "ModernBertForMaskedLM":
        mask = {"full_attention": mask, "sliding_attention": mask}
    own, read, _, _ = both(model, input_ids=IDS, attention_mask=mask)
    assert agree(own[1, :9], read[1, :9])


def test_image_blocks_see_themselves_both_ways():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    width = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**width, "vocab_size": 64, "max_position_embeddings": 64, "num_key_value_heads": 2, "head_dim": 8}
    config = Gemma3Config(
        text_config={**text, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config={**width, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4, image_token_index=60, boi_token_index=61, eoi_token_index=62,
    )  # fmt: skip
    model = Gemma3ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    ids = IDS[:1] % 50 + 3
    ids[0, 3:7] = 60
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16), "token_type_ids": (ids == 60).long()}
    own, read, calls, warned = both(model, **inputs)
    with torch.no_grad():
        causal = model(**{**inputs, "token_type_ids": torch.zeros_like(ids)}).logits
    assert (own - causal).abs().max() > 1e-3
    assert agree(own, read)
    assert len(warned) == 1
    assert [(c.kind, c.layer) for c in calls] == [("encoder", 0), ("encoder", 1), ("self", 0), ("self", 1)]


def test_padding_of_the_target_does_not_count_as_a_reader_of_the_source(tiny):
    model = tiny("T5ForConditionalGeneration")
    source, target = torch.ones_like(IDS), torch.ones(2, 9, dtype=torch.long)
    source[0, 10:], target[1, 4:] = 0, 0
    inputs = {
        "input_ids": IDS, "attention_mask": source, "decoder_input_ids": IDS[:, :9], "decoder_attention_mask": target,
    }  # fmt: skip
    _, _, calls, _ = both(model, **inputs)
    cross = [call for call in calls if call.kind == "cross"]
    for call in cross:
        assert torch.equal(call.site.query_mask, target.bool())
        assert torch.equal(call.site.key_mask, source.bool())
        assert torch.allclose(call.emitted.key_sum.sum(-1), target.sum(1)[:, None].float(), atol=1e-4)


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
@pytest.mark.parametrize("target", [5, 12])
@pytest.mark.parametrize("stated", [False, True])
def test_padding_of_the_source_is_not_taken_for_padding_of_the_target(tiny, name, target, stated):
    source = torch.ones_like(IDS)
    source[0, 11:] = 0
    inputs = {"input_ids": IDS, "attention_mask": source, "decoder_input_ids": IDS[:, :target]}
    inputs |= {"decoder_attention_mask": torch.ones(2, target, dtype=torch.long)} if stated else {}
    _, _, calls, _ = both(tiny(name), **inputs)
    assert {call.kind for call in calls} == {"encoder", "self", "cross"}
    for call in calls:
        if call.kind != "encoder":
            assert call.site.query_mask is None
        if call.kind == "self":
            assert call.site.key_mask is None
        else:
            assert torch.equal(call.site.key_mask, source.bool())


def test_padding_of_the_text_is_not_taken_for_padding_of_the_image():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape, image_size=8, patch_size=4),
        text_config=LlamaConfig(**shape, vocab_size=64, num_key_value_heads=2),
        image_token_index=63,
    )
    model = LlavaForConditionalGeneration(config).eval()
    ids = torch.cat([torch.full((2, 4), 63), IDS[:, :6]], 1)
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    _, _, calls, _ = both(model, input_ids=ids, attention_mask=mask, pixel_values=torch.randn(2, 3, 8, 8))
    masks = {call.kind: call.site.query_mask for call in calls}
    assert masks["encoder"] is None
    assert torch.equal(masks["self"], mask.bool())

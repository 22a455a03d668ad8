"""A capture leaves no trace, says what it cannot read, and lets gradients through."""

from __future__ import annotations

import copy

import pytest
import torch
from attnlab_kernels import Emit

from attnlab.capture import capture
from attnlab.errors import AttnlabError, UnsupportedModelError

IDS = torch.arange(3, 11)[None]


def implementations(model):
    return {id(m.config): m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_the_model_is_restored_after_an_error_inside_its_forward(tiny, name, error):
    model = tiny(name)
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})
    before, own = implementations(model), model(**inputs).logits

    def stop(call):
        raise error

    with pytest.raises(error), capture(model, emit=Emit(entropy=True), on_call=stop):
        model(**inputs)
    assert implementations(model) == before
    assert hooks(model) == 0
    assert torch.equal(model(**inputs).logits, own)


def test_a_forward_that_failed_does_not_confuse_the_next(tiny):
    model = tiny("AlbertForMaskedLM")
    with capture(model, emit=Emit(entropy=True)) as session:
        with pytest.raises(IndexError):
            model(torch.tensor([[1000]]))
        model(IDS)
    assert [call.layer for call in session.calls] == [0, 1]


def test_captures_nest_and_end_in_any_order(tiny):
    model = tiny("LlamaForCausalLM")
    before, own = implementations(model), model(IDS).logits
    outer, inner = capture(model, emit=Emit(entropy=True)), capture(model, emit=Emit(key_sum=True))
    first = outer.__enter__()
    second = inner.__enter__()
    read = model(IDS).logits
    outer.__exit__(None, None, None)
    model(IDS)
    inner.__exit__(None, None, None)
    assert torch.allclose(own, read, atol=1e-5)
    assert (len(first.calls), len(second.calls)) == (2, 4)
    assert first.calls[0].emitted.entropy is not None
    assert second.calls[0].emitted.key_sum is not None
    assert implementations(model) == before


def test_another_model_with_the_same_configuration_is_left_alone(tiny):
    for name in ("LlamaForCausalLM", "Gemma2ForCausalLM"):
        model = tiny(name)
        other = copy.deepcopy(model)
        for ours, theirs in zip(model.modules(), other.modules(), strict=True):
            if hasattr(ours, "config"):
                theirs.config = ours.config
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
        own = other(IDS, attention_mask=mask).logits
        with capture(model, emit=Emit(entropy=True)) as session:
            assert torch.equal(other(IDS, attention_mask=mask).logits, own)
        assert session.calls == []


def test_a_site_that_wants_nothing_runs_the_models_own_attention(tiny):
    for name in ("LlamaForCausalLM", "Gemma2ForCausalLM", "T5ForConditionalGeneration"):
        model = tiny(name)
        inputs = {"input_ids": IDS, "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]])}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = IDS
        with torch.no_grad():
            own = model(**inputs).logits
            with capture(model, emit=lambda site: None) as session:
                assert torch.equal(model(**inputs).logits, own)
        assert session.calls == []


def test_emit_is_chosen_by_site_and_calls_go_to_the_callback(tiny):
    seen = []
    model = tiny("LlamaForCausalLM")
    emit = Emit(entropy=True)
    with capture(
        model, emit=lambda s: emit if s.layer == 1 else None, qkv=lambda s: s.layer == 0, on_call=seen.append
    ) as session:
        model(IDS)
    assert session.calls == []
    assert [(call.layer, call.q is not None, call.emitted.entropy is not None) for call in seen] == [
        (0, True, False),
        (1, False, True),
    ]


def test_dropout_in_training_is_refused(tiny):
    model = tiny("GPT2LMHeadModel").train()
    with pytest.raises(AttnlabError, match="dropout"), capture(model, emit=Emit(entropy=True)):
        model(IDS)


def test_a_module_that_is_no_model_of_transformers_is_refused():
    with pytest.raises(AttnlabError, match="Linear"), capture(torch.nn.Linear(2, 2)):
        pass


def test_a_keyword_that_changes_attention_is_refused_by_name(tiny):
    model = tiny("LlamaForCausalLM")
    with pytest.raises(UnsupportedModelError, match="indices"), capture(model, emit=Emit(entropy=True)):
        model(IDS, indices=torch.zeros(1, dtype=torch.long))


def test_layers_that_do_not_all_call_are_noticed(tiny):
    model = tiny("LlamaForCausalLM")
    with capture(model, emit=Emit(entropy=True)) as session:
        model(IDS)
        session.watcher.calls["self", 1] += 1
        with pytest.raises(UnsupportedModelError, match="equally often"):
            session.check()
        session.watcher.calls["self", 1] -= 1


def test_gradients_are_those_of_the_models_own_attention(tiny):
    model = tiny("LlamaForCausalLM")
    names = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.v_proj.weight")
    weights = [model.get_parameter(name) for name in names]
    own = torch.autograd.grad(model(IDS).logits.square().mean(), weights)
    with capture(model, emit=Emit(entropy=True)) as session:
        read = torch.autograd.grad(model(IDS).logits.square().mean(), weights, retain_graph=True)
        entropy = session.calls[1].emitted.entropy.mean()
        through = torch.autograd.grad(entropy, weights)
    for a, b in zip(own, read, strict=True):
        assert torch.allclose(a, b, atol=1e-4 * float(a.abs().max()))
    assert all(float(gradient.abs().max()) > 0 for gradient in through)


def test_nothing_is_registered_by_an_import():
    import subprocess
    import sys

    code = "import attnlab.capture, attnlab.models, sys; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_calls_that_gradient_checkpointing_repeats_are_not_recorded_again(tiny, reentrant):
    model = tiny("LlamaForCausalLM").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    weight = model.get_parameter("model.layers.0.self_attn.v_proj.weight")
    model(IDS, labels=IDS).loss.backward()
    own, weight.grad = weight.grad, None
    with capture(model, emit=Emit(entropy=True)) as session:
        model(IDS, labels=IDS).loss.backward()
    assert [call.layer for call in session.calls] == [0, 1]
    assert torch.allclose(weight.grad, own, atol=1e-4 * float(own.abs().max()))


def test_a_layer_called_by_itself_keeps_its_number(tiny):
    model = tiny("LlamaForCausalLM")
    hidden = torch.randn(1, 5, 32)
    angles = model.model.rotary_emb(hidden, torch.arange(5)[None])
    with capture(model, emit=Emit(entropy=True)) as session:
        for _ in range(2):
            model.model.layers[0].self_attn(hidden, position_embeddings=angles, attention_mask=None)
    assert [call.layer for call in session.calls] == [0, 0]

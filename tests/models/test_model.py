"""Running a model for its attention or its loss, without more logits than needed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers
from attnlab_kernels import Emit

from attnlab.capture import capture
from attnlab.errors import AttnlabError
from attnlab.models import load_model
from attnlab.runs.analysis import Batch

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDTH = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON = {**WIDTH, "vocab_size": 50, "max_position_embeddings": 64, **SPECIAL}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
PAIR = {"vocab_size": 50, "decoder_start_token_id": 0, **SPECIAL}

LANGUAGE_MODELS = {
    "GPT2LMHeadModel": {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 50, "n_positions": 64, **SPECIAL},
    "LlamaForCausalLM": GROUPED,
    "Gemma2ForCausalLM": {**GROUPED, "final_logit_softcapping": 3.0},
    "CohereForCausalLM": {**GROUPED, "logit_scale": 0.3},
    "Llama4ForCausalLM": {**GROUPED, "num_local_experts": 2, "intermediate_size_mlp": 48},
    "T5ForConditionalGeneration": {**PAIR, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "BartForConditionalGeneration": {
        **PAIR, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    },
}  # fmt: skip


def build(name, **options):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    hf = kind(kind.config_class(**options)).eval()
    for parameter in hf.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return load_model(hf)


def padded_batch(pair):
    ids = torch.randint(3, 50, (2, 300 if pair else 60), generator=torch.Generator().manual_seed(1))[:, :60]
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 40:] = False
    if not pair:
        return Batch((0, 1), ids, mask)
    return Batch((0, 1), ids, mask, ids[:, :30].flip(1), mask[:, 10:40].flip(1).flip(0))


def inputs_of(batch):
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long()}
    if batch.decoder_input_ids is not None:
        inputs["decoder_input_ids"] = batch.decoder_input_ids
        inputs["decoder_attention_mask"] = batch.decoder_attention_mask.long()
    return inputs


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_the_loss_is_that_of_the_models_logits(name, monkeypatch):
    model = build(name, **LANGUAGE_MODELS[name])
    batch = padded_batch(model.is_encoder_decoder)
    monkeypatch.setattr("attnlab.models.loss.next_token_loss.__defaults__", (7,))
    loss = model.forward(batch, loss=True)
    with torch.no_grad():
        logits = model.hf(**inputs_of(batch), use_cache=False).logits.double()
    ids, mask = batch.input_ids, batch.attention_mask
    if model.is_encoder_decoder:
        ids, mask = batch.decoder_input_ids, batch.decoder_attention_mask
    expected = -logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    expected = expected * (mask[:, 1:] & mask[:, :-1])
    assert loss.dtype == torch.float32
    assert torch.allclose(loss.double(), expected, atol=2e-4)
    assert "forward" not in model.body.__dict__


@pytest.mark.parametrize("name", [*LANGUAGE_MODELS, "BertForMaskedLM"])
def test_running_without_logits_makes_the_same_attention_calls(name):
    model = build(name, **LANGUAGE_MODELS.get(name, COMMON))
    batch = padded_batch(model.is_encoder_decoder)
    emit = Emit(entropy=True, key_sum=True)
    with capture(model, emit=emit) as short:
        assert model.forward(batch) is None
    with torch.no_grad(), capture(model, emit=emit) as full:
        model.hf(**inputs_of(batch))
    assert [(c.kind, c.layer) for c in short.calls] == [(c.kind, c.layer) for c in full.calls]
    for a, b in zip(short.calls, full.calls, strict=True):
        assert torch.equal(a.emitted.entropy, b.emitted.entropy)
        assert torch.equal(a.emitted.key_sum, b.emitted.key_sum)


def test_the_head_is_not_run_unless_a_loss_is_asked_for():
    model = build("LlamaForCausalLM", **GROUPED)
    ran = []
    model.hf.lm_head.register_forward_hook(lambda module, args, output: ran.append(output.shape[1]))
    batch = padded_batch(pair=False)
    model.forward(batch)
    assert ran == []
    model.forward(batch, loss=True)
    assert sum(ran) == 59


def test_an_encoder_decoder_without_targets_reads_its_input_shifted_right():
    model = build("T5ForConditionalGeneration", **LANGUAGE_MODELS["T5ForConditionalGeneration"])
    batch = padded_batch(pair=False)
    shifted = torch.cat([torch.zeros(2, 1, dtype=torch.long), batch.input_ids[:, :-1]], 1)
    mask = torch.cat([torch.ones(2, 1, dtype=torch.bool), batch.attention_mask[:, :-1]], 1)
    given = Batch((0, 1), batch.input_ids, batch.attention_mask, shifted, mask)
    assert torch.equal(model.forward(batch, loss=True), model.forward(given, loss=True))


def test_a_model_that_does_not_predict_the_next_token_has_no_loss():
    model = build("BertForMaskedLM", **COMMON)
    assert not model.has_loss
    with pytest.raises(AttnlabError, match="next token"):
        model.forward(padded_batch(pair=False), loss=True)


def test_the_fingerprint_depends_on_every_weight_and_on_nothing_else():
    model, again = build("LlamaForCausalLM", **GROUPED), build("LlamaForCausalLM", **GROUPED)
    own = model.fingerprint()
    assert own == again.fingerprint()
    with capture(model, emit=Emit(entropy=True)):
        assert model.fingerprint() == own
    with torch.no_grad():
        again.hf.model.layers[1].mlp.up_proj.weight[3, 3] += 1e-3
    assert own != again.fingerprint()


def test_the_fingerprint_is_the_same_in_another_process(tmp_path):
    model = build("LlamaForCausalLM", **GROUPED)
    model.hf.save_pretrained(tmp_path)
    code = f"from attnlab.models import load_model; print(load_model({str(tmp_path)!r}, device='cpu').fingerprint())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == load_model(tmp_path, device="cpu").fingerprint()

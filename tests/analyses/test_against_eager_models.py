"""Whole runs on random models against these models' own eager attention matrices, one sequence at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import attnlab

from .attention_oracle import Expected, expected_of

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
SEQUENCES = [[3, 14, 15, 9, 26, 5], [35, 8, 9, 7, 9, 32, 38, 46, 26, 43, 38, 3, 27, 9, 50 - 1], [1, 2]]


def sharpened(model):
    """Weights large enough for attention that is far from uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model.eval()


def compare(heads, kind, expected: list[list[Expected]], names=Expected._fields):
    """The table of a run against [sequence][layer] values."""
    rows = heads[heads["kind"] == kind].sort_values(["layer", "head"])
    for name in names:
        values = np.array([[getattr(layer, name) for layer in sequence] for sequence in expected])
        found = rows[rows["metric"] == name]
        mean = np.nanmean(values, axis=0).ravel()
        np.testing.assert_allclose(found["value"], mean, rtol=1e-4, atol=1e-5, err_msg=f"{kind} {name}")
        spread = np.nanstd(values, axis=0, ddof=1).ravel() / math.sqrt(int(found["n"].iloc[0]))
        np.testing.assert_allclose(found["stderr"], spread, rtol=1e-3, atol=1e-5, err_msg=f"{kind} {name}")


@pytest.mark.parametrize("which", ["llama", "mistral", "bert"])
def test_a_padded_batch_agrees_with_each_sequence_alone(which):
    torch.manual_seed(0)
    window = None
    if which == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))
    elif which == "mistral":
        window = 4
        model = MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=window))
    else:
        model = BertModel(BertConfig(**SIZES))
    sharpened(model)
    run = attnlab.analyze(model, SEQUENCES, batch_size=3, progress=False)
    model.set_attn_implementation("eager")
    expected = []
    for ids in SEQUENCES:
        with torch.no_grad():
            patterns = model(torch.tensor([ids]), output_attentions=True).attentions
        n = len(ids)
        visible = torch.ones(n, n, dtype=torch.bool)
        if which != "bert":
            visible = visible.tril()
        if window:
            visible = visible.triu(1 - window)
        expected.append([expected_of(p[0], torch.ones(n, dtype=torch.bool), visible) for p in patterns])
    compare(run.heads, "self", expected)


def test_an_encoder_decoder_agrees_in_all_three_kinds():
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=50, d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    model = sharpened(BartForConditionalGeneration(config))
    targets = [[4, 5, 6, 7], [8, 9, 10], [11, 12, 13, 14, 15]]
    pairs = [{"input_ids": ids, "target": target} for ids, target in zip(SEQUENCES, targets, strict=True)]
    run = attnlab.analyze(model, pairs, batch_size=3, progress=False)
    model.set_attn_implementation("eager")
    found: dict[str, list[list[Expected]]] = {"self": [], "encoder": [], "cross": []}
    start = config.decoder_start_token_id
    for ids, target in zip(SEQUENCES, targets, strict=True):
        read = torch.tensor([[start, *target[:-1]]])
        with torch.no_grad():
            outputs = model(torch.tensor([ids]), decoder_input_ids=read, output_attentions=True)
        n_q, n_k = read.shape[1], len(ids)
        sides = {
            "self": (outputs.decoder_attentions, torch.ones(n_q, n_q, dtype=torch.bool).tril()),
            "encoder": (outputs.encoder_attentions, torch.ones(n_k, n_k, dtype=torch.bool)),
            "cross": (outputs.cross_attentions, torch.ones(n_q, n_k, dtype=torch.bool)),
        }
        for kind, (patterns, visible) in sides.items():
            rows = torch.ones(len(visible), dtype=torch.bool)
            found[kind].append([expected_of(p[0], rows, visible) for p in patterns])
    compare(run.heads, "self", found["self"])
    compare(run.heads, "encoder", found["encoder"])
    compare(run.heads, "cross", found["cross"], [name for name in Expected._fields if name != "distance"])
    assert set(run["sinks"].table["kind"]) == {"self", "encoder", "cross"}


def test_learned_sinks_are_measured_as_the_share_that_the_keys_lack():
    torch.manual_seed(0)
    config = GptOssConfig(
        **SIZES, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=8,
    )  # fmt: skip
    model = GptOssForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.normal_()
    model.eval()
    run = attnlab.analyze(model, SEQUENCES, batch_size=3, progress=False)
    model.set_attn_implementation("eager")
    lacking, first = [], []
    for ids in SEQUENCES:
        with torch.no_grad():
            patterns = torch.stack(model(torch.tensor([ids]), output_attentions=True).attentions)[:, 0]
        lacking.append((1 - patterns.sum(-1)).mean(-1).numpy())
        first.append(patterns[..., 0].mean(-1).numpy())
    heads = run.heads.sort_values(["layer", "head"])
    for name, values in (("learned_sink_mass", lacking), ("sink_mass", first)):
        found = heads[heads["metric"] == name]["value"]
        np.testing.assert_allclose(found, np.mean(values, axis=0).ravel(), rtol=1e-4, atol=1e-5, err_msg=name)

"""Trained checkpoints: statistics agree with `eager` matrices and with activations that somebody else recorded."""

from __future__ import annotations

import base64
import json

import numpy as np
import torch
from attnlab_kernels import Emit

from attnlab.capture import capture
from attnlab.models import load_model


def test_stories260k_has_the_entropy_and_first_token_mass_of_its_eager_matrices(inputs_folder, eager_matrices):
    model = load_model(inputs_folder / "stories260k", device="cpu")
    texts = json.loads((inputs_folder / "text" / "tinystories_1000.json").read_text())[:4]
    ids = torch.tensor([model.tokenizer(text)["input_ids"][:160] for text in texts])
    first = torch.zeros(ids.shape[1], 1)
    first[0] = 1
    with torch.no_grad(), capture(model, emit=Emit(entropy=True, key_probes=first)) as session:
        model.hf(ids)
    matrices = eager_matrices(model.hf, input_ids=ids)["self"]
    assert len(session.calls) == len(matrices) == 5
    for call, pattern in zip(session.calls, matrices, strict=True):
        assert torch.allclose(call.emitted.entropy, torch.special.entr(pattern).sum(-1).float(), atol=1e-4)
        alpha = call.emitted.key_probes[..., 0].mean(-1)
        assert torch.allclose(alpha, pattern[..., 0].mean(-1).float(), atol=1e-4)
        assert alpha.mean(0).max() < 0.1  # this model has no sink


def test_nano_sort_has_the_patterns_queries_and_keys_that_its_author_recorded(inputs_folder):
    model = load_model(inputs_folder / "nano_sort", device="cpu")
    recorded = json.loads((inputs_folder / "nano_sort" / "recorded_activations.json").read_text())

    def array(entry):
        values = np.frombuffer(base64.b64decode(entry["data"]), dtype="<f4")
        return torch.from_numpy(values.copy()).reshape(entry["shape"])

    ids = array(recorded["idx"]).long()
    with torch.no_grad(), capture(model, emit=Emit(rows=torch.arange(11), entropy=True), qkv=True) as session:
        logits = model.hf(ids).logits
    # The author recorded q, k, v and the pattern of the first block, and what came out at the end.
    first, pattern = session.calls[0], array(recorded["attSm"])
    for name, got in (("q", first.q), ("k", first.k), ("v", first.v)):
        assert torch.allclose(got, array(recorded[name]), atol=1e-5)
    assert torch.allclose(first.emitted.rows, pattern, atol=1e-5)
    assert torch.allclose(first.emitted.entropy, torch.special.entr(pattern).sum(-1), atol=1e-5)
    assert torch.allclose(first.z.transpose(1, 2).flatten(2), array(recorded["y"]), atol=1e-5)
    assert torch.allclose(logits, array(recorded["lm_head"]), atol=1e-3)

"""A sorting GPT whose own authors recorded the attention of its first layer: an oracle that nobody here produced."""

from __future__ import annotations

import base64
import json

import numpy as np
import torch

import attnlab

from .attention_oracle import Expected, expected_of


def recorded(inputs, name):
    about = json.loads((inputs / "nano_sort" / "recorded_activations.json").read_text())[name]
    return np.frombuffer(base64.b64decode(about["data"]), "<f4").reshape(about["shape"])


def test_statistics_of_the_first_layer_agree_with_the_recorded_attention(inputs):
    ids = recorded(inputs, "idx").astype(int).tolist()
    patterns = torch.from_numpy(recorded(inputs, "attSm").copy())
    run = attnlab.analyze(str(inputs / "nano_sort"), ids, progress=False)
    n = patterns.shape[-1]
    visible, rows = torch.ones(n, n, dtype=torch.bool).tril(), torch.ones(n, dtype=torch.bool)
    expected = [expected_of(pattern, rows, visible) for pattern in patterns]
    first_layer = run.heads[run.heads["layer"] == 0].sort_values("head")
    for name in Expected._fields:
        values = np.mean([getattr(sequence, name) for sequence in expected], axis=0)
        found = first_layer[first_layer["metric"] == name]["value"]
        np.testing.assert_allclose(found, values, rtol=1e-4, atol=1e-4, err_msg=name)


def test_the_viewer_shows_the_recorded_attention(inputs):
    ids = recorded(inputs, "idx").astype(int)[0]
    shown = attnlab.view(str(inputs / "nano_sort"), ids.tolist()).patterns[0]
    np.testing.assert_allclose(shown, recorded(inputs, "attSm")[0], atol=1e-4)

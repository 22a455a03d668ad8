from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from attnlab_analyses.entropy import Entropy
from attnlab_kernels import attention

from attnlab.capture.call import Call, Site
from attnlab.runs.analysis import Batch, Layout

LAYOUT = Layout("hand-made", {"self": (2,)}, vocabulary=10)


def site_of(q, k, *, kind="self", query_mask=None, key_mask=None, causal=True):
    return Site(
        layer=0, kind=kind, n_heads=q.shape[1], n_key_heads=k.shape[1], batch=q.shape[0], n_queries=q.shape[2],
        n_keys=k.shape[2], query_mask=query_mask, key_mask=key_mask, causal=causal,
        query_offset=k.shape[2] - q.shape[2], window=None, device=q.device,
    )  # fmt: skip


def run_one(analysis, q, k, *, sinks=None, **masks):
    """One call through the dense backend, as a run makes it."""
    site = site_of(q, k, **masks)
    ids = torch.zeros(q.shape[0], k.shape[2], dtype=torch.int64)
    batch = Batch(tuple(range(q.shape[0])), ids, torch.ones_like(ids, dtype=torch.bool))
    emit = analysis.needs(site, batch).emit
    options = {"causal": site.causal, "key_mask": site.key_mask, "query_mask": site.query_mask, "sinks": sinks}
    _, emitted = attention(q, k, k, emit=emit, backend="dense", **options)
    analysis.update(Call(site, emitted, scale=q.shape[-1] ** -0.5), batch)
    return analysis


def metric(analysis, name, head=0):
    rows = analysis.result().heads
    return rows[(rows["metric"] == name) & (rows["head"] == head)]["value"].item()


def hand_made(*logits):
    """Queries and keys of one head whose scores are the rows of logits (scale 1 / sqrt(D) undone)."""
    scores = torch.tensor(logits, dtype=torch.float64)
    n = scores.shape[1]
    k = torch.eye(n, dtype=torch.float64)[None, None]
    return (scores * math.sqrt(n))[None, None].repeat(1, 2, 1, 1), k.repeat(1, 2, 1, 1)


def test_a_matrix_worked_by_hand():
    # rows: [1], [1/2 1/2], [1/4 1/4 1/2]
    q, k = hand_made([0, 0, 0], [0, 0, 0], [0, 0, math.log(2)])
    analysis = run_one(Entropy(LAYOUT), q, k)
    ln2 = math.log(2)
    assert metric(analysis, "entropy") == pytest.approx((0 + ln2 + 1.5 * ln2) / 3)
    assert metric(analysis, "entropy_normalized") == pytest.approx((1 + 1.5 * ln2 / math.log(3)) / 2)
    assert metric(analysis, "effective_keys") == pytest.approx((1 + 2 + 1 / (2 / 16 + 1 / 4)) / 3)
    assert metric(analysis, "max_probability") == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert metric(analysis, "distance") == pytest.approx((0 + 0.5 + (2 * 0.25 + 1 * 0.25)) / 3)


def test_uniform_attention_is_one_and_its_histogram_is_in_the_last_bin():
    q, k = hand_made(*[[0.0] * 5] * 5)
    analysis = run_one(Entropy(LAYOUT), q, k)
    assert metric(analysis, "entropy_normalized") == pytest.approx(1.0)
    histogram = analysis.result().arrays["self.histogram"]
    assert histogram.values[0, 0, -1] == 4
    assert histogram.values.sum() == 8
    assert len(histogram.coordinates["bin"]) == histogram.values.shape[-1] + 1


def test_padding_changes_nothing_on_either_side():
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 6, 8, dtype=torch.float64), torch.randn(1, 2, 6, 8, dtype=torch.float64)
    alone = run_one(Entropy(LAYOUT), q, k).result()
    for left, right in ((0, 3), (3, 0), (2, 1)):
        pad = (0, 0, left, right)
        mask = torch.zeros(1, 6 + left + right, dtype=torch.bool)
        mask[:, left : left + 6] = True
        padded_q, padded_k = (torch.nn.functional.pad(t, pad, value=1.0) for t in (q, k))
        padded = run_one(Entropy(LAYOUT), padded_q, padded_k, query_mask=mask, key_mask=mask).result()
        np.testing.assert_allclose(padded.heads["value"], alone.heads["value"], rtol=1e-9)
        for name in alone.arrays:
            length = alone.arrays[name].values.shape[-1]
            np.testing.assert_allclose(padded.arrays[name].values[..., :length], alone.arrays[name].values, rtol=1e-9)


def test_a_learned_sink_counts_as_one_more_choice():
    q, k = hand_made([0, 0], [0, 0])
    analysis = run_one(Entropy(LAYOUT), q, k, sinks=torch.zeros(2, dtype=torch.float64))
    # row 2: thirds over two keys and the sink; row 1 sees one key
    assert metric(analysis, "entropy_normalized") == pytest.approx(1.0)
    assert metric(analysis, "effective_keys") == pytest.approx((1 + (2 / 3) ** 2 / (2 / 9)) / 2)
    assert metric(analysis, "distance") == pytest.approx((0 + 1 / 3) / 2)


def test_effective_keys_keep_their_digits_where_a_learned_sink_takes_nearly_everything():
    q, k = (tensor.float() for tensor in hand_made([0, 0], [0, 0]))
    analysis = run_one(Entropy(LAYOUT), q, k, sinks=torch.full((2,), 12.0))
    assert metric(analysis, "effective_keys") == pytest.approx((1 + 2) / 2, rel=1e-5)


def test_cross_attention_has_no_distance():
    layout = Layout("pair", {"self": (1,), "encoder": (1,), "cross": (2,)})
    q, k = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 5, 4)
    result = run_one(Entropy(layout), q, k, kind="cross", causal=False).result()
    assert set(result.heads["kind"]) == {"cross"}
    assert "distance" not in set(result.heads["metric"])
    assert "cross.distance_by_position" not in result.arrays


def test_the_distance_keeps_its_digits_at_great_length():
    n = 20000
    q = torch.zeros(1, 1, 3, 4)
    q[..., 0] = 300.0
    k = torch.zeros(1, 1, n, 4)
    k[0, 0, n - 5, 0] = 1.0
    analysis = Entropy(Layout("long", {"self": (1,)}))
    run_one(analysis, q, k)
    assert metric(analysis, "distance") == pytest.approx(np.mean([2, 3, 4]), abs=2e-3)


def test_the_profile_is_the_mean_of_the_rows_at_a_position():
    torch.manual_seed(1)
    q, k = torch.randn(3, 2, 9, 4, dtype=torch.float64), torch.randn(3, 2, 9, 4, dtype=torch.float64)
    result = run_one(Entropy(LAYOUT), q, k).result()
    profile = result.arrays["self.entropy_by_position"]
    scores = (q @ k.mT / 2).masked_fill(~torch.ones(9, 9).tril().bool(), -torch.inf)
    entropy = torch.distributions.Categorical(logits=scores).entropy()
    edges = profile.coordinates["position"]
    assert edges[:7] == [0, 1, 2, 3, 4, 6, 8]
    for place, (low, high) in enumerate(itertools.pairwise(edges)):
        expected = entropy[:, :, low : min(high, 9)].mean((0, 2))
        np.testing.assert_allclose(profile.values[0, :, place], expected, rtol=1e-9)


def test_spread_over_rows_and_over_sequences_are_told_apart():
    torch.manual_seed(2)
    q, k = torch.randn(4, 2, 6, 4, dtype=torch.float64), torch.randn(4, 2, 6, 4, dtype=torch.float64)
    table = run_one(Entropy(LAYOUT), q, k).result().table
    scores = (q @ k.mT / 2).masked_fill(~torch.ones(6, 6).tril().bool(), -torch.inf)
    entropy = torch.distributions.Categorical(logits=scores).entropy().transpose(0, 1)
    np.testing.assert_allclose(table["entropy_sd_rows"], entropy.reshape(2, -1).std(-1), rtol=1e-9)
    np.testing.assert_allclose(table["entropy_sd_sequences"], entropy.mean(-1).std(-1), rtol=1e-9)


def test_a_long_list_of_focused_heads_ends_with_how_many_more():
    layout = Layout("hand-made", {"self": (8,)})
    q = k = 100 * torch.eye(6).expand(1, 8, 6, 6)
    findings = run_one(Entropy(layout), q, k).result().findings
    assert any(sentence.endswith("L0H4, L0H5 and 2 more.") for sentence in findings)


def test_merged_states_give_the_result_of_one_pass():
    torch.manual_seed(3)
    q, k = torch.randn(5, 2, 7, 4), torch.randn(5, 2, 7, 4)
    whole = run_one(Entropy(LAYOUT), q, k).result()
    merged = Entropy(LAYOUT)
    for part in (slice(0, 2), slice(2, 5)):
        fresh = Entropy(LAYOUT)
        fresh.load_state_dict(run_one(Entropy(LAYOUT), q[part], k[part]).state_dict())
        merged.merge(fresh)
    np.testing.assert_allclose(merged.result().heads["value"], whole.heads["value"], rtol=1e-9)
    np.testing.assert_allclose(merged.result().heads["stderr"], whole.heads["stderr"], rtol=1e-6)


def test_agrees_with_the_eager_matrices_of_a_real_model(inputs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import attnlab

    from .attention_oracle import expected_of

    whole = json.loads((inputs / "text" / "tinystories_1000.json").read_text())[:4]
    texts = [text[: 40 + 40 * i] for i, text in enumerate(whole)]
    folder = inputs / "stories260k"
    run = attnlab.analyze(str(folder), texts, analyses=["entropy", "sinks"])
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            patterns = eager(ids, output_attentions=True).attentions
        n = ids.shape[1]
        visible = torch.ones(n, n, dtype=torch.bool).tril()
        found.append([expected_of(p[0], torch.ones(n, dtype=torch.bool), visible) for p in patterns])
    heads = run.heads
    for name in found[0][0]._fields:
        expected = np.array([[getattr(layer, name) for layer in sequence] for sequence in found])
        rows = heads[heads["metric"] == name].sort_values(["layer", "head"])
        np.testing.assert_allclose(rows["value"], expected.mean(0).ravel(), rtol=1e-4, atol=1e-4, err_msg=name)
        stderr = expected.std(0, ddof=1).ravel() / math.sqrt(len(texts))
        np.testing.assert_allclose(rows["stderr"], stderr, rtol=1e-3, atol=1e-6, err_msg=name)
    assert run["sinks"].findings[0].startswith("No head has a sink at the first token")

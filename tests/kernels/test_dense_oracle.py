"""The dense backend against torch's own functions and plain loops; every other backend is held to it."""

import itertools
import math

import pytest
import torch
from attnlab_kernels import Emit, RelativeBias, attention

from .strategies import DEVICE

B, H, N, M, D = 2, 4, 5, 7, 3
QUERY_MASK = torch.tensor([[True] * 5, [True, True, False, True, False]])


def tensors(seed: int = 0, key_heads: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((B, H, N, D), (B, key_heads, M, D), (B, key_heads, M, D))
    return tuple(torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)  # type: ignore[return-value]


def dense(*qkv: torch.Tensor, emit: Emit | None = None, **options: object):
    return attention(*qkv, emit=emit, backend="dense", **options)  # type: ignore[arg-type]


def pattern(q: torch.Tensor, k: torch.Tensor, **options: object) -> torch.Tensor:
    """The whole pattern, as chosen rows (themselves compared with loops below)."""
    every = torch.arange(q.shape[2])
    return dense(q, k, k, emit=Emit(rows=every), **options).emitted.rows


def by_hand(q: torch.Tensor, k: torch.Tensor, causal: bool = False) -> torch.Tensor:
    a = torch.zeros(B, H, N, M, dtype=torch.float64)
    for b, h, i in itertools.product(range(B), range(H), range(N)):
        keys = [j for j in range(M) if not causal or j <= i + M - N]
        powers = [math.exp(float(q[b, h, i] @ k[b, h // (H // k.shape[1]), j]) / math.sqrt(D)) for j in keys]
        for j, power in zip(keys, powers, strict=True):
            a[b, h, i, j] = power / sum(powers)
    return a


@pytest.mark.parametrize("causal", [False, True])
def test_rows_are_the_pattern_of_plain_loops(causal: bool) -> None:
    q, k, _ = tensors()
    torch.testing.assert_close(pattern(q, k, causal=causal), by_hand(q, k, causal))


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_output_is_that_of_scaled_dot_product_attention(key_heads: int) -> None:
    q, k, v = tensors(key_heads=key_heads)
    mask = torch.rand(B, H, N, M) < 0.7
    mask[..., 0] = True
    bias = torch.randn(B, H, N, M, dtype=torch.float64)
    out = dense(q, k, v, mask=mask, bias=bias, scale=0.3).out
    merged = torch.where(mask, bias, -math.inf)
    torch.testing.assert_close(
        out, torch.nn.functional.scaled_dot_product_attention(q, k, v, merged, scale=0.3, enable_gqa=True)
    )


def test_row_statistics_are_those_of_a_categorical_distribution() -> None:
    q, k, v = tensors()
    scores = q @ k.repeat_interleave(2, 1).mT / math.sqrt(D)
    rows = torch.distributions.Categorical(logits=scores)
    emit = Emit(lse=True, entropy=True, max_probability=True, argmax=True, collision=True, top_k=3)
    found = dense(q, k, v, emit=emit).emitted
    torch.testing.assert_close(found.lse, torch.logsumexp(scores, -1))
    torch.testing.assert_close(found.entropy, rows.entropy())
    torch.testing.assert_close(found.max_probability, rows.probs.amax(-1))
    torch.testing.assert_close(found.collision, rows.probs.square().sum(-1))
    assert torch.equal(found.argmax, scores.argmax(-1))
    best = torch.topk(rows.probs, 3)
    torch.testing.assert_close(found.top_k_values, best.values)
    assert torch.equal(found.top_k_keys, best.indices)


def test_entropy_is_lse_minus_what_attention_over_the_keys_reads() -> None:
    q, k, _ = tensors()
    out, found = dense(q, k, k, causal=True, emit=Emit(lse=True, entropy=True))
    torch.testing.assert_close(found.entropy, found.lse - (q * out).sum(-1) / math.sqrt(D))


def test_key_sums_are_the_gradient_of_the_output_to_a_column_of_values() -> None:
    q, k, v = tensors()
    ones = torch.ones(B, H, M, 1, dtype=torch.float64, requires_grad=True)
    reads = QUERY_MASK[:, None, :, None].double()
    (torch.nn.functional.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), ones) * reads).sum().backward()
    found = dense(q, k, v, query_mask=QUERY_MASK, emit=Emit(key_sum=True)).emitted
    torch.testing.assert_close(found.key_sum, ones.grad.squeeze(-1))


def test_statistics_over_queries_leave_padding_out() -> None:
    q, k, v = tensors()
    probes = torch.randn(N, 2, dtype=torch.float64)
    edges = [-9, -1, 0, 1, 3, 20]
    emit = Emit(query_probes=probes, key_sum=True, key_square=True, key_max=True, pool=3, offsets=edges, head_gram=True)
    found = dense(q, k, v, causal=True, query_mask=QUERY_MASK, emit=emit).emitted
    a = by_hand(q, k, causal=True) * QUERY_MASK[:, None, :, None]
    seen = (by_hand(q, k, causal=True) > 0) & QUERY_MASK[:, None, :, None]
    torch.testing.assert_close(found.query_probes, torch.einsum("bhij,ig->bhjg", a, probes))
    torch.testing.assert_close(found.key_sum, a.sum(2))
    torch.testing.assert_close(found.key_square, a.pow(2).sum(2))
    torch.testing.assert_close(found.key_max, a.amax(2))
    assert torch.equal(found.key_count, seen.sum(2).double())
    torch.testing.assert_close(found.head_gram, torch.einsum("bhij,bgij->bhg", a, a))
    sums, counts = torch.zeros(2, B, H, 2, 3, dtype=torch.float64)
    profile, number = torch.zeros(2, B, H, 5, dtype=torch.float64)
    for i, j in itertools.product(range(N), range(M)):
        sums[..., i // 3, j // 3] += a[..., i, j]
        counts[..., i // 3, j // 3] += seen[..., i, j]
        for bin_, (low, high) in enumerate(itertools.pairwise(edges)):
            if low <= i + M - N - j < high:
                profile[..., bin_] += a[..., i, j]
                number[..., bin_] += seen[..., i, j]
    torch.testing.assert_close(found.pooled, sums / counts.clamp(min=1))
    torch.testing.assert_close(found.pooled_count, counts)
    torch.testing.assert_close(found.offsets, profile)
    torch.testing.assert_close(found.offset_count, number)


def test_chosen_entries_are_entries_of_the_pattern_and_minus_one_is_zero() -> None:
    q, k, v = tensors()
    a = by_hand(q, k)
    gather = torch.tensor([[[0, 6, -1]] * N, [[3, -1, 3]] * N])
    emit = Emit(gather=gather, rows=torch.tensor([4, -1, 0]), columns=torch.tensor([[6, -1], [0, 2]]))
    found = dense(q, k, v, emit=emit).emitted
    zero = torch.zeros(B, H, N, dtype=torch.float64)
    torch.testing.assert_close(found.gathered[0, :, :, 1], a[0, :, :, 6])
    torch.testing.assert_close(found.gathered[1, :, :, 2], a[1, :, :, 3])
    torch.testing.assert_close(found.gathered[0, :, :, 2], zero[0])
    torch.testing.assert_close(found.rows[:, :, 0], a[:, :, 4])
    assert not found.rows[:, :, 1].any()
    torch.testing.assert_close(found.columns[0, ..., 0], a[0, ..., 6])
    torch.testing.assert_close(found.columns[1], a[1][..., [0, 2]])
    assert not found.columns[0, ..., 1].any()


def test_key_probes_are_read_as_values_are() -> None:
    q, k, v = tensors(key_heads=4)
    out, found = dense(q, k, v, causal=True, emit=Emit(key_probes=v))
    torch.testing.assert_close(found.key_probes, out)


def test_a_learned_sink_is_one_more_key_without_a_value() -> None:
    q, k, v = tensors(key_heads=4)
    sinks = torch.randn(H, dtype=torch.float64)
    emit = Emit(lse=True, entropy=True, max_probability=True, collision=True)
    out, found = dense(q, k, v, sinks=sinks, emit=emit)
    logits = torch.cat([q @ k.mT / math.sqrt(D), sinks[None, :, None, None].expand(B, -1, N, 1)], -1)
    probs = logits.softmax(-1)
    torch.testing.assert_close(out, probs[..., :M] @ v)
    torch.testing.assert_close(found.lse, logits.logsumexp(-1))
    torch.testing.assert_close(found.entropy, torch.distributions.Categorical(logits=logits).entropy())
    torch.testing.assert_close(found.learned_sink_mass, probs[..., M])
    torch.testing.assert_close(found.max_probability, probs[..., :M].amax(-1))
    torch.testing.assert_close(found.collision, probs[..., :M].square().sum(-1))


def test_the_sigmoid_normaliser_reads_weights_as_they_are_and_rates_rows_by_their_shares() -> None:
    q, k, v = tensors(key_heads=4)
    emit = Emit(lse=True, entropy=True, max_probability=True, collision=True, top_k=1, key_sum=True)
    out, found = dense(q, k, v, normalizer="sigmoid", sigmoid_bias=-0.7, emit=emit)
    a = torch.sigmoid(q @ k.mT / math.sqrt(D) - 0.7)
    shares = torch.distributions.Categorical(probs=a)
    torch.testing.assert_close(out, a @ v)
    torch.testing.assert_close(found.lse, a.sum(-1).log())
    torch.testing.assert_close(found.entropy, shares.entropy())
    torch.testing.assert_close(found.max_probability, shares.probs.amax(-1))
    torch.testing.assert_close(found.top_k_values[..., 0], shares.probs.amax(-1))
    torch.testing.assert_close(found.collision, shares.probs.square().sum(-1))
    torch.testing.assert_close(found.key_sum, a.sum(-2))


def test_biases_and_cap_are_added_in_the_documented_order() -> None:
    q, k, v = tensors(key_heads=4)
    slopes, table = torch.rand(H, dtype=torch.float64), torch.randn(8, H, dtype=torch.float64)
    relative = RelativeBias(table, bidirectional=True, max_distance=20)
    out = dense(q, k, v, softcap=1.5, alibi=slopes, relative_bias=relative).out
    distance = torch.arange(N)[:, None] + M - N - torch.arange(M)
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention
    buckets = t5._relative_position_bucket(-distance, True, 8, 20)
    scores = 1.5 * torch.tanh(q @ k.mT / math.sqrt(D) / 1.5)
    scores = scores - slopes[:, None, None] * distance.abs() + table[buckets].permute(2, 0, 1)
    torch.testing.assert_close(out, scores.softmax(-1) @ v)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_buckets_are_those_of_t5(bidirectional: bool) -> None:
    from attnlab_kernels.problem import relative_buckets

    t5 = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention
    relative = torch.arange(-300, 300)
    expected = t5._relative_position_bucket(relative, bidirectional, 32, 128)
    assert torch.equal(relative_buckets(relative, 32, bidirectional, 128), expected)


def test_gradients_are_those_of_finite_differences() -> None:
    q, k, v = tensors()
    leaves = [q, k, v, torch.randn(M, 2).double(), torch.randn(N, M).double(), torch.randn(H).double()]
    leaves += [torch.rand(H).double(), torch.randn(8, H).double()]
    for leaf in leaves:
        leaf.requires_grad_()

    def run(q, k, v, probes, bias, sinks, slopes, table):
        emit = Emit(lse=True, entropy=True, key_probes=probes)
        options = {"bias": bias, "sinks": sinks, "alibi": slopes, "relative_bias": RelativeBias(table, True, 20)}
        out, found = dense(q, k, v, causal=True, softcap=2.0, window=3, emit=emit, **options)
        return out, found.lse, found.entropy, found.key_probes

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", ["dense", "tiled", "triton"])
@pytest.mark.parametrize("sinks", [False, True])
def test_a_row_that_sees_no_key(backend: str, sinks: bool) -> None:
    dtype = torch.float32 if backend == "triton" else torch.float64
    q, k, v = (t.to(DEVICE, dtype) for t in tensors())
    every = torch.arange(N, device=DEVICE)
    emit = Emit(lse=True, entropy=True, max_probability=True, argmax=True, collision=True, top_k=2, rows=every)
    logit = torch.randn(H, device=DEVICE, dtype=dtype) if sinks else None
    mask = torch.ones(1, 1, N, M, dtype=torch.bool, device=DEVICE)
    mask[..., 2, :] = False
    q.requires_grad_()
    out, found = attention(q, k, v, mask=mask, sinks=logit, emit=emit, backend=backend)
    assert not out[:, :, 2].any()
    assert not found.entropy[:, :, 2].any()
    assert not found.rows[:, :, 2].any()
    assert not found.collision[:, :, 2].any()
    assert not found.max_probability[:, :, 2].any()
    assert (found.argmax[:, :, 2] == -1).all()
    assert (found.top_k_keys[:, :, 2] == -1).all()
    expected = torch.full((B, H), -math.inf, device=DEVICE, dtype=dtype) if logit is None else logit.expand(B, H)
    torch.testing.assert_close(found.lse[:, :, 2], expected)
    if sinks:
        assert (found.learned_sink_mass[:, :, 2] == 1).all()
    (out.sum() + found.entropy.sum()).backward()
    assert q.grad.isfinite().all()

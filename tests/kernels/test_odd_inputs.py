"""Padding that holds NaN, weights that underflow, sinks that are off, empty batches: what real callers hand over."""

import math
import sys

import pytest
import torch
from attnlab_kernels import Emit, RelativeBias, attention

from .strategies import DEVICE

BACKENDS = pytest.mark.parametrize("backend", ["dense", "tiled", "triton"])
OVER_QUERIES = ("key_sum", "key_square", "key_max", "query_probes", "pooled", "offsets", "head_gram")


@BACKENDS
@pytest.mark.parametrize("junk", [math.nan, math.inf])
def test_what_a_hidden_key_holds_reaches_nothing(backend: str, junk: float) -> None:
    q, k, v = torch.randn(3, 2, 2, 6, 4, device=DEVICE)
    probes = torch.randn(2, 6, 2, device=DEVICE)
    exists = torch.arange(6, device=DEVICE) < torch.tensor([[4], [6]], device=DEVICE)
    found = []
    for held in (0.0, junk):
        k, v = (t.masked_fill(~exists[:, None, :, None], held).requires_grad_() for t in (k.detach(), v.detach()))
        emit = Emit(entropy=True, key_sum=True, key_probes=probes.masked_fill(~exists[..., None], held))
        out, emitted = attention(q, k, v, key_mask=exists, emit=emit, backend=backend)
        grads = torch.autograd.grad(out.sum() + emitted.entropy.sum(), (k, v))
        found.append((out, emitted.entropy, emitted.key_sum, emitted.key_probes, *grads))
    for clean, got in zip(*found, strict=True):
        assert torch.equal(clean, got)


@BACKENDS
@pytest.mark.parametrize("junk", [math.nan, math.inf])
def test_what_a_padding_query_holds_reaches_no_statistic_over_queries(backend: str, junk: float) -> None:
    q, k, v = torch.randn(3, 2, 2, 6, 4, device=DEVICE)
    probes = torch.randn(2, 6, 2, device=DEVICE)
    counts = torch.arange(6, device=DEVICE) < torch.tensor([[4], [6]], device=DEVICE)
    found = []
    for held in (0.0, junk):
        emit = Emit(
            key_sum=True, key_square=True, key_max=True, pool=2, offsets=[-2, 0, 3], head_gram=True,
            query_probes=probes.masked_fill(~counts[..., None], held),
        )  # fmt: skip
        padded = q.masked_fill(~counts[:, None, :, None], held)
        found.append(attention(padded, k, v, query_mask=counts, emit=emit, backend=backend).emitted)
    for name in OVER_QUERIES:
        assert torch.equal(getattr(found[0], name), getattr(found[1], name)), name


@BACKENDS
def test_weights_that_underflow_are_listed_before_hidden_keys(backend: str) -> None:
    keys = torch.tensor([0.0, 0.0, -400.0, -300.0, 0.0], device=DEVICE).view(1, 1, 5, 1)
    bias = torch.tensor([-math.inf, -math.inf, 0.0, 0.0, 1.0], device=DEVICE)
    q = torch.ones(1, 1, 3, 1, device=DEVICE)
    found = attention(q, keys, keys, bias=bias, emit=Emit(top_k=4), backend=backend).emitted
    assert found.top_k_keys[0, 0].tolist() == [[4, 3, 2, -1]] * 3
    assert found.top_k_values[0, 0].tolist() == [[1.0, 0.0, 0.0, 0.0]] * 3


@BACKENDS
def test_a_sink_of_minus_infinity_is_no_sink(backend: str) -> None:
    q, k, v = torch.randn(3, 1, 2, 4, 4, device=DEVICE)
    mask = torch.arange(4, device=DEVICE)[:, None] != 1
    emit = Emit(lse=True, entropy=True, max_probability=True, collision=True)
    sinks = torch.full((2,), -math.inf, device=DEVICE)
    out, found = attention(q, k, v, mask=mask, sinks=sinks, emit=emit, backend=backend)
    plain = attention(q, k, v, mask=mask, emit=emit, backend="dense")
    torch.testing.assert_close(out, plain.out)
    for name in ("lse", "entropy", "max_probability", "collision"):
        torch.testing.assert_close(getattr(found, name), getattr(plain.emitted, name))
    assert not found.learned_sink_mass.any()


@BACKENDS
@pytest.mark.parametrize("options", ["causal", "relative bias", "ALiBi", "sigmoid", "sinks"])
@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 4, 5), (2, 0, 5), (2, 5, 0), (1, 1, 1)])
def test_an_axis_may_be_empty(backend: str, batch: int, queries: int, keys: int, options: str) -> None:
    chosen = {
        "causal": {"causal": True},
        "relative bias": {"relative_bias": RelativeBias(torch.randn(8, 4, device=DEVICE), max_distance=32)},
        "ALiBi": {"alibi": torch.rand(4, device=DEVICE)},
        "sigmoid": {"normalizer": "sigmoid", "sigmoid_bias": -1.0},
        "sinks": {"sinks": torch.randn(4, device=DEVICE)},
    }[options]
    q = torch.randn(batch, 4, queries, 8, device=DEVICE, requires_grad=True)
    k = torch.randn(batch, 2, keys, 8, device=DEVICE)
    none = torch.tensor([-1, -1], device=DEVICE)
    emit = Emit(
        entropy=True, argmax=True, collision=True, visible=True, key_sum=True, key_max=True, top_k=2, pool=2,
        offsets=[0, 1, 9], rows=none, columns=none, gather=none.expand(batch, queries, 2), head_gram=True,
    )  # fmt: skip
    out, found = attention(q, k, k, **chosen, emit=emit, backend=backend)
    (out.sum() + found.entropy.sum()).backward()
    assert out.shape == q.shape == q.grad.shape
    assert found.rows.shape == (batch, 4, 2, keys)
    assert found.columns.shape == (batch, 4, queries, 2)
    assert found.key_sum.shape == (batch, 4, keys)


@BACKENDS
@pytest.mark.parametrize("length", [8, 600])
def test_autocast_around_a_call_changes_nothing(backend: str, length: int) -> None:
    heads = 1 if backend == "triton" else 4  # in the interpreter
    length = 70 if backend == "triton" and length > 70 else length
    q, k, v = torch.randn(3, 1, heads, length, 16, device=DEVICE)
    q.requires_grad_()
    found = []
    for lowered in (False, True):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=lowered):
            emit = Emit(key_sum=True, key_probes=v)
            out, emitted = attention(q, k, v, causal=True, emit=emit, backend=backend)
        found.append((out, emitted.key_sum, emitted.key_probes, torch.autograd.grad(out.sum(), q)[0]))
    for plain, got in zip(*found, strict=True):
        assert torch.equal(plain, got)


def test_gradients_taken_under_autocast_are_those_without() -> None:
    q, k, v = torch.randn(3, 1, 4, 40, 16)
    q.requires_grad_()
    plain = torch.autograd.grad(attention(q, k, v).out.sum(), q)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = torch.autograd.grad(attention(q, k, v).out.sum(), q)
    assert torch.equal(plain[0], lowered[0])


def test_a_sigmoid_bias_keeps_its_digits_in_double_precision() -> None:
    q, k, v = torch.randn(3, 1, 1, 4, 4, dtype=torch.float64)
    emit = Emit(rows=torch.arange(4))
    found = attention(q, k, v, normalizer="sigmoid", sigmoid_bias=0.1, emit=emit, backend="dense").emitted
    torch.testing.assert_close(found.rows, torch.sigmoid(q @ k.mT / 2 + 0.1), rtol=1e-14, atol=0)


@BACKENDS
def test_edges_may_be_the_largest_integers(backend: str) -> None:
    q, k, v = torch.randn(3, 1, 1, 4, 4, device=DEVICE)
    edges = [-sys.maxsize - 1, 0, sys.maxsize]
    found = attention(q, k, v, emit=Emit(offsets=edges, pool=4), backend=backend).emitted
    assert found.offset_count.tolist() == [[[6.0, 10.0]]]
    assert found.offsets.sum().item() == pytest.approx(4.0)


@BACKENDS
def test_a_list_of_blocks_asks_for_as_many_maps(backend: str) -> None:
    q, k, v = torch.randn(3, 1, 1, 4, 4, device=DEVICE)
    found = attention(q, k, v, emit=Emit(pool=[2, 4]), backend=backend).emitted
    assert [tuple(pooled.shape) for pooled in found.pooled] == [(1, 1, 2, 2), (1, 1, 1, 1)]

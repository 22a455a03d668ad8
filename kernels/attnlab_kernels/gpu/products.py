"""Gradient products: tiles of f(A, G), with G = dO V^T, times vectors and summed over blocks.

`right_kernel` holds queries and walks over keys, for f x. `left_kernel` holds keys and walks over queries, for x^T f
and block sums; its tiles are computed as [keys, queries], so that no product is transposed. What both must know of a
row was found before: its normaliser, and for the loss change what `removal.py` finds.
"""

# triton's own decorators and scalars carry no types
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnlab_kernels.gpu.pools import add_to_pool, count_in_pool
from attnlab_kernels.gpu.scores import head_of, load_columns, load_rows, logits, weights
from attnlab_kernels.gpu.tiles import key_tile, plan_keys, plan_queries, query_tile


class Vectors(NamedTuple):
    """Vectors x, a `Strided` [b, h, n, g] in float32 with g constexpr columns, and their products [B, Hq, N, g]."""

    x: Any
    g: Any
    products: Any


@triton.jit
def _load_row(rows, removal, base, o_m, counts):
    """Pivot, log Z, and what removal found, of a tile's queries; those that do not count get a pivot of +inf."""
    pivot = tl.load(rows.pivot + base + o_m, mask=counts, other=float("inf"))
    log_z = tl.load(rows.log_z + base + o_m, mask=counts, other=0.0)
    total = 0.0
    largest = -1
    others = 0.0
    if removal is not None:
        total = tl.load(removal.total + base + o_m, mask=counts, other=0.0)
        largest = tl.load(removal.largest + base + o_m, mask=counts, other=-1)
        others = tl.load(removal.others + base + o_m, mask=counts, other=0.0)
    return pivot, log_z, total, largest, others


@triton.jit
def _entries(b_s, b_g, o_n, x, removal, pivot, log_z, total, largest, others):
    """f of a tile from its logits and gradients; the rows' numbers broadcast to it."""
    b_a = weights(b_s, x, pivot, log_z)
    if removal is None:
        return tl.maximum(b_a * b_g, 0.0, propagate_nan=tl.PropagateNan.ALL)
    is_largest = o_n == largest
    return b_a * tl.where(is_largest, others - b_g, b_g - total) / tl.where(is_largest, 1.0, b_a - 1.0)


@triton.jit
def _visit_keys(
    acc, pivot, log_z, total, largest, others, b_q, b_do, x, removal, vectors, p_k, p_v, p_x, i_b, i_h, i_m, start,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_G: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the products of a tile of queries."""
    o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    o_n = (start + tl.arange(0, BLOCK_N))[None, :]
    b_k = load_columns(p_k, x.k, start, x.keys, x.d, BLOCK_N, BLOCK_D, MASKED)
    b_s = tl.dot(b_q, b_k, input_precision="ieee")
    b_s, _, _ = logits(b_s, x, i_b, i_h, o_m, o_n, MASKED)
    b_v = load_columns(p_v, x.v, start, x.keys, x.dv, BLOCK_N, BLOCK_DV, MASKED)
    b_g = tl.dot(b_do, b_v, input_precision="ieee")
    b_f = _entries(b_s, b_g, o_n, x, removal, pivot, log_z, total, largest, others)
    b_x = load_rows(p_x, vectors.x, start, x.keys, vectors.g, BLOCK_N, BLOCK_G, MASKED)
    return acc + tl.dot(b_f, b_x, input_precision=PRECISION)


@triton.jit
def right_kernel(
    x, grad_out, schedule, rows, removal, vectors,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_G: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """f x for one tile of queries of one head. Grid (B * Hq, tiles)."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_b = i_bh // x.heads
    i_h = i_bh % x.heads
    i_m = tl.program_id(1)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = o_m < x.queries
    b_q = load_rows(head_of(x.q, i_b, i_h), x.q, i_m * BLOCK_M, x.queries, x.d, BLOCK_M, BLOCK_D, True)
    p_do = head_of(grad_out, i_b, i_h)
    b_do = load_rows(p_do, grad_out, i_m * BLOCK_M, x.queries, x.dv, BLOCK_M, BLOCK_DV, True)
    p_k = head_of(x.k, i_b, i_h // x.group)
    p_v = head_of(x.v, i_b, i_h // x.group)
    p_x = head_of(vectors.x, i_b, i_h)
    pivot, log_z, total, largest, others = _load_row(rows, removal, i_bh * x.queries, o_m[:, None], in_rows[:, None])
    acc = tl.zeros([BLOCK_M, BLOCK_G], tl.float32)
    full, every, h0, h1, w0, w1, w2 = plan_keys(x, schedule, i_b, i_h, i_m, BLOCK_M, BLOCK_N)
    for t in range(full):
        start = key_tile(t, schedule, i_b, i_h, i_m, full, h0, h1, w0, w1, w2, True) * BLOCK_N
        acc = _visit_keys(
            acc, pivot, log_z, total, largest, others, b_q, b_do, x, removal, vectors, p_k, p_v, p_x,
            i_b, i_h, i_m, start, False, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_G, PRECISION,
        )  # fmt: skip
    for t in range(full, every):
        start = key_tile(t, schedule, i_b, i_h, i_m, full, h0, h1, w0, w1, w2, False) * BLOCK_N
        acc = _visit_keys(
            acc, pivot, log_z, total, largest, others, b_q, b_do, x, removal, vectors, p_k, p_v, p_x,
            i_b, i_h, i_m, start, True, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_G, PRECISION,
        )  # fmt: skip
    o_g = tl.arange(0, BLOCK_G)[None, :]
    at = vectors.products + (i_bh * x.queries + o_m)[:, None] * vectors.g + o_g
    tl.store(at, acc, mask=in_rows[:, None] & (o_g < vectors.g))


@triton.jit
def _later(o, size, PART: tl.constexpr):
    """Which positions stand behind the boundary of a block within their part of a tile; see `Pool`."""
    return o // size > o // PART * PART // size


@triton.jit
def _pool(
    b_f, b_s, factor, pool, x, i_bh, i_m, i_n, late_n,
    piece: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write one piece of a tile's sums of f and of its visible entries, over the queries whose factor is 1, not 0."""
    add_to_pool(b_f, factor, pool, i_bh, i_m, i_n, late_n, piece, BLOCK_M, BLOCK_N)
    GUARDED: tl.constexpr = MASKED or x.bias is not None
    b_seen = b_s != -float("inf")
    count_in_pool(b_seen, factor, pool, x, i_bh, i_m, i_n, late_n, piece, GUARDED, BLOCK_M, BLOCK_N)


@triton.jit
def _visit_queries(
    acc, b_k, b_v, x, grad_out, rows, removal, vectors, pool, p_q, p_do, p_x, i_b, i_h, i_bh, i_n, i_m,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_G: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of queries to the products of a tile of keys, and write its part of the block sums."""
    start = i_m * BLOCK_M
    o_m = start + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    counts = o_m < x.queries
    if x.query_mask is not None:
        at = x.query_mask + i_b * x.queries + o_m
        counts = counts & (tl.load(at, mask=counts, other=0) != 0)
    b_q = load_columns(p_q, x.q, start, x.queries, x.d, BLOCK_M, BLOCK_D, MASKED)
    b_s = tl.dot(b_k, b_q, input_precision="ieee")
    b_s, _, _ = logits(b_s, x, i_b, i_h, o_m[None, :], o_n[:, None], MASKED)
    b_do = load_columns(p_do, grad_out, start, x.queries, x.dv, BLOCK_M, BLOCK_DV, MASKED)
    b_g = tl.dot(b_v, b_do, input_precision="ieee")
    pivot, log_z, total, largest, others = _load_row(rows, removal, i_bh * x.queries, o_m[None, :], counts[None, :])
    b_f = _entries(b_s, b_g, o_n[:, None], x, removal, pivot, log_z, total, largest, others)
    if x.query_mask is not None:
        # Whatever padding holds, NaN too, must not be read.
        b_f = tl.where(counts[None, :], b_f, 0.0)
    if vectors is not None:
        b_x = load_rows(p_x, vectors.x, start, x.queries, vectors.g, BLOCK_M, BLOCK_G, MASKED)
        acc += tl.dot(b_f, b_x, input_precision=PRECISION)
    if pool is not None:
        late_n = o_n < 0
        factor = counts.to(tl.float32)
        if pool.split:
            late_n = _later(o_n, pool.size, pool.part_n)
            late_m = _later(o_m, pool.size, pool.part_m)
            late = tl.where(late_m, factor, 0.0)
            factor -= late
            _pool(b_f, b_s, late, pool, x, i_bh, i_m, i_n, late_n, 1, MASKED, BLOCK_M, BLOCK_N)
        _pool(b_f, b_s, factor, pool, x, i_bh, i_m, i_n, late_n, 0, MASKED, BLOCK_M, BLOCK_N)
    return acc


@triton.jit
def left_kernel(
    x, grad_out, schedule, rows, removal, vectors, pool,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_G: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x^T f and block sums for one tile of keys of one query head. Grid (B * Hq, tiles)."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_b = i_bh // x.heads
    i_h = i_bh % x.heads
    i_n = tl.program_id(1)
    p_k = head_of(x.k, i_b, i_h // x.group)
    p_v = head_of(x.v, i_b, i_h // x.group)
    b_k = load_rows(p_k, x.k, i_n * BLOCK_N, x.keys, x.d, BLOCK_N, BLOCK_D, True)
    b_v = load_rows(p_v, x.v, i_n * BLOCK_N, x.keys, x.dv, BLOCK_N, BLOCK_DV, True)
    p_q = head_of(x.q, i_b, i_h)
    p_do = head_of(grad_out, i_b, i_h)
    p_x = p_q
    if vectors is not None:
        p_x = head_of(vectors.x, i_b, i_h)
    acc = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)
    full, every, low, clear_low = plan_queries(x, schedule, i_b, i_h, i_n, BLOCK_M, BLOCK_N)
    for t in range(full):
        i_m = query_tile(t, schedule, i_b, i_h, i_n, full, low, clear_low, True)
        acc = _visit_queries(
            acc, b_k, b_v, x, grad_out, rows, removal, vectors, pool, p_q, p_do, p_x, i_b, i_h, i_bh, i_n, i_m,
            False, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_G, PRECISION,
        )  # fmt: skip
    for t in range(full, every):
        i_m = query_tile(t, schedule, i_b, i_h, i_n, full, low, clear_low, False)
        acc = _visit_queries(
            acc, b_k, b_v, x, grad_out, rows, removal, vectors, pool, p_q, p_do, p_x, i_b, i_h, i_bh, i_n, i_m,
            True, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_G, PRECISION,
        )  # fmt: skip
    if vectors is not None:
        o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
        o_g = tl.arange(0, BLOCK_G)[None, :]
        at = vectors.products + (i_bh * x.keys + o_n) * vectors.g + o_g
        tl.store(at, acc, mask=(o_n < x.keys) & (o_g < vectors.g))

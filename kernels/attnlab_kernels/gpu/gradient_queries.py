"""Gradients of queries, and of what is added to logits: a program holds a tile of queries and walks over keys.

Sums over keys (slopes, a bias by query, the buckets of a relative bias) are left for each row or tile, to be added in
a fixed order afterwards. A bias that differs by query and by key has a kernel of its own, a program for each tile.
"""

# triton's own decorators and scalars carry no types
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnlab_kernels.gpu.gradient_tile import gradient, load_above, store_rows
from attnlab_kernels.gpu.scores import head_of, load_columns, load_rows, logits
from attnlab_kernels.gpu.tiles import key_tile, plan_keys


class QuerySide(NamedTuple):
    """Gradients of queries and what is summed over keys, contiguous; None compiles out.

    Attributes:
        q: [B, Hq, Nq, D].
        rows, slopes: [B, Hq, Nq], sums of the biases' gradient, plain and times the derivative of the slope.
        table: [B * Hq, tiles, BLOCK_U], sums of it over each bucket of a relative bias.
    """

    q: Any
    rows: Any
    slopes: Any
    table: Any


@triton.jit
def _tile_gradient(
    b_q, b_do, b_df, pivot, log_z, centre, d_entropy, x, above, i_b, i_h, o_m, start_n,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile's biases and of its products, with queries in rows, and the keys as columns."""
    o_n = start_n + tl.arange(0, BLOCK_N)[None, :]
    i_n = i_h // x.group
    b_k = load_columns(head_of(x.k, i_b, i_n), x.k, start_n, x.keys, x.d, BLOCK_N, BLOCK_D, MASKED)
    b_s = tl.dot(b_q, b_k, input_precision="ieee")
    b_s, d_bias, d_score = logits(b_s, x, i_b, i_h, o_m[:, None], o_n, MASKED)
    b_dp = tl.zeros_like(b_s)
    if above.d_out is not None:
        b_v = load_columns(head_of(x.v, i_b, i_n), x.v, start_n, x.keys, x.dv, BLOCK_N, BLOCK_DV, MASKED)
        b_dp = tl.dot(b_do, b_v, input_precision="ieee")
    if above.d_probes is not None:
        b_f = load_columns(head_of(x.f, i_b, i_h), x.f, start_n, x.keys, x.g, BLOCK_N, BLOCK_G, MASKED)
        b_dp = tl.dot(b_df, b_f, b_dp, input_precision=above.precision)
    _, b_ds = gradient(b_s, b_dp, x, above, pivot[:, None], log_z[:, None], centre[:, None], d_entropy[:, None], MASKED)
    return b_ds * d_bias, b_ds * d_score, b_k


@triton.jit
def _load_queries(
    x, above, i_b, i_h, start_m, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """A tile of queries with everything that its rows need."""
    o_m = start_m + tl.arange(0, BLOCK_M)
    b_q = load_rows(head_of(x.q, i_b, i_h), x.q, start_m, x.queries, x.d, BLOCK_M, BLOCK_D, True)
    b_do = b_q
    b_df = b_q
    if above.d_out is not None:
        p_do = head_of(above.d_out, i_b, i_h)
        b_do = load_rows(p_do, above.d_out, start_m, x.queries, x.dv, BLOCK_M, BLOCK_DV, True)
    if above.d_probes is not None:
        p_df = head_of(above.d_probes, i_b, i_h)
        b_df = load_rows(p_df, above.d_probes, start_m, x.queries, x.g, BLOCK_M, BLOCK_G, True)
    o_row = (i_b * x.heads + i_h).to(tl.int64) * x.queries + o_m
    pivot, log_z, centre, d_entropy = load_above(above, o_row, o_m < x.queries, True)
    return b_q, b_do, b_df, pivot, log_z, centre, d_entropy


@triton.jit
def _add_buckets(table, b_db, x, o_m, start_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr):
    """Add a tile to the sums of the buckets that it touches: far from the diagonal one or two."""
    reach = x.relative.reach
    o_n = start_n + tl.arange(0, BLOCK_N)
    distance = o_n[None, :] - o_m[:, None] - x.offset
    b_bucket = tl.load(x.relative.buckets + tl.minimum(tl.maximum(distance, -reach), reach) + reach)
    start_m = tl.min(o_m, 0)
    low = tl.minimum(tl.maximum(start_n - (start_m + BLOCK_M - 1) - x.offset, -reach), reach)
    high = tl.minimum(tl.maximum(start_n + BLOCK_N - 1 - start_m - x.offset, -reach), reach)
    o_u = tl.arange(0, BLOCK_U)
    # Buckets rise with the distance on either side. Those of keys after the query, if any, follow all the others.
    before = 0
    stop = 0
    if low <= 0:
        before = tl.load(x.relative.buckets + reach + tl.minimum(high, 0))
        stop = tl.load(x.relative.buckets + reach + low) + 1
    for u in range(before, stop):
        total = tl.sum(tl.sum(tl.where(b_bucket == u, b_db, 0.0), 1), 0)
        table += tl.where(o_u == u, total, 0.0)
    if high > 0:
        after = tl.maximum(stop, tl.load(x.relative.buckets + reach + tl.maximum(low, 1)))
        for u in range(after, tl.load(x.relative.buckets + reach + high) + 1):
            total = tl.sum(tl.sum(tl.where(b_bucket == u, b_db, 0.0), 1), 0)
            table += tl.where(o_u == u, total, 0.0)
    return table


@triton.jit
def _visit_keys(
    dq, row, slope, table, b_q, b_do, b_df, pivot, log_z, centre, d_entropy, x, above, wanted, i_b, i_h, o_m, start_n,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the gradients of a tile of queries."""
    b_db, b_ds, b_k = _tile_gradient(
        b_q, b_do, b_df, pivot, log_z, centre, d_entropy, x, above, i_b, i_h, o_m, start_n,
        MASKED, BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_G,
    )  # fmt: skip
    if wanted.q is not None:
        dq = tl.dot(b_ds.to(b_k.dtype), tl.trans(b_k), dq, input_precision="ieee")
    if wanted.rows is not None:
        row += tl.sum(b_db, 1)
    if wanted.slopes is not None:
        o_n = start_n + tl.arange(0, BLOCK_N)
        slope -= tl.sum(b_db * tl.abs(o_n[None, :] - o_m[:, None] - x.offset).to(tl.float32), 1)
    if wanted.table is not None:
        table = _add_buckets(table, b_db, x, o_m, start_n, BLOCK_M, BLOCK_N, BLOCK_U)
    return dq, row, slope, table


@triton.jit
def query_gradient_kernel(
    x, schedule, above, wanted,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """One program: one tile of queries of one head. Grid (B * Hq, tiles)."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_b = i_bh // x.heads
    i_h = i_bh % x.heads
    i_m = tl.program_id(1)
    start_m = i_m * BLOCK_M
    o_m = start_m + tl.arange(0, BLOCK_M)
    b_q, b_do, b_df, pivot, log_z, centre, d_entropy = _load_queries(
        x, above, i_b, i_h, start_m, BLOCK_M, BLOCK_D, BLOCK_DV, BLOCK_G
    )
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row = tl.zeros([BLOCK_M], tl.float32)
    slope = tl.zeros([BLOCK_M], tl.float32)
    table = tl.zeros([BLOCK_U], tl.float32)
    full, every, h0, h1, w0, w1, w2 = plan_keys(x, schedule, i_b, i_h, i_m, BLOCK_M, BLOCK_N)
    for t in range(full):
        start_n = key_tile(t, schedule, i_b, i_h, i_m, full, h0, h1, w0, w1, w2, True) * BLOCK_N
        dq, row, slope, table = _visit_keys(
            dq, row, slope, table, b_q, b_do, b_df, pivot, log_z, centre, d_entropy, x, above, wanted, i_b, i_h, o_m,
            start_n, False, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_G, BLOCK_U,
        )  # fmt: skip
    for t in range(full, every):
        start_n = key_tile(t, schedule, i_b, i_h, i_m, full, h0, h1, w0, w1, w2, False) * BLOCK_N
        dq, row, slope, table = _visit_keys(
            dq, row, slope, table, b_q, b_do, b_df, pivot, log_z, centre, d_entropy, x, above, wanted, i_b, i_h, o_m,
            start_n, True, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_G, BLOCK_U,
        )  # fmt: skip
    if wanted.q is not None:
        store_rows(wanted.q, dq * x.scale, i_bh, start_m, x.queries, x.d, BLOCK_M, BLOCK_D)
    o_row = i_bh * x.queries + o_m
    if wanted.rows is not None:
        tl.store(wanted.rows + o_row, row, mask=o_m < x.queries)
    if wanted.slopes is not None:
        tl.store(wanted.slopes + o_row, slope, mask=o_m < x.queries)
    if wanted.table is not None:
        at = (i_bh * tl.num_programs(1) + i_m) * BLOCK_U + tl.arange(0, BLOCK_U)
        tl.store(wanted.table + at, table)


@triton.jit
def bias_gradient_kernel(
    x, above, d_bias, bias_heads, batches, heads,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """One program: one tile of `d_bias` [b or 1, h or 1, Nq, Nk], over the batch rows and heads that share it.

    Grid (b h of the bias, tiles of queries, tiles of keys); `batches` and `heads` share one entry.
    """
    i_first = tl.program_id(0).to(tl.int64)
    i_m = tl.program_id(1)
    i_n = tl.program_id(2)
    start_m = i_m * BLOCK_M
    start_n = i_n * BLOCK_N
    o_m = start_m + tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    shared = batches * heads
    if x.prefix is None:
        # Other masks only hide more than positions do.
        _full, every, _h0, head, left, _w1, _w2 = plan_keys(x, None, i_first, i_first, i_m, BLOCK_M, BLOCK_N)
        seen = (i_n < head) | ((i_n >= left) & (i_n < left + every - head))
        shared = tl.where(seen, shared, 0)
    for u in range(shared):
        i_b = (i_first // bias_heads) * batches + u // heads
        i_h = (i_first % bias_heads) * heads + u % heads
        b_q, b_do, b_df, pivot, log_z, centre, d_entropy = _load_queries(
            x, above, i_b, i_h, start_m, BLOCK_M, BLOCK_D, BLOCK_DV, BLOCK_G
        )
        b_db, _b_ds, _b_k = _tile_gradient(
            b_q, b_do, b_df, pivot, log_z, centre, d_entropy, x, above, i_b, i_h, o_m, start_n,
            True, BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_G,
        )  # fmt: skip
        acc += b_db
    o_n = start_n + tl.arange(0, BLOCK_N)
    at = d_bias + (i_first * x.queries + o_m[:, None]) * x.keys + o_n[None, :]
    tl.store(at, acc.to(d_bias.dtype.element_ty), mask=(o_m[:, None] < x.queries) & (o_n[None, :] < x.keys))

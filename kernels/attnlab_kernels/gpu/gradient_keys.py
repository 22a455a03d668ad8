"""Gradients of keys, values and key probes: a program holds a tile of keys and walks over the queries that see it.

The heads of a group come one after another, so no two programs write to one place and every sum has a fixed order.
With few key heads they are spread over programs, whose sums are added afterwards (FlashAttention-2, arXiv 2307.08691).
"""

# triton's own decorators and scalars carry no types
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnlab_kernels.gpu.gradient_tile import gradient, load_above, store_rows
from attnlab_kernels.gpu.scores import head_of, load_rows, logits
from attnlab_kernels.gpu.tiles import plan_queries, query_tile


class KeySide(NamedTuple):
    """Gradients of keys, contiguous; None compiles out.

    Attributes:
        k, v, f: [parts, B, Hkv, Nk, columns], summed over the heads of each part of a group.
        f_heads: [B, Hq, Nk, G], of probes that differ by head.
        columns: [B, Hq, Nk], the sum over queries of the biases' gradient.
    """

    k: Any
    v: Any
    f: Any
    f_heads: Any
    columns: Any


@triton.jit
def _visit_queries(
    dk, dv, df, b_k, b_v, b_f, x, above, wanted, column, i_b, i_h, start_m, start_n,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Add one tile of queries to the gradients of a tile of keys. Keys stand in rows: the products are K Q^T."""
    o_m = start_m + tl.arange(0, BLOCK_M)
    o_n = start_n + tl.arange(0, BLOCK_N)
    b_q = load_rows(head_of(x.q, i_b, i_h), x.q, start_m, x.queries, x.d, BLOCK_M, BLOCK_D, MASKED)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
    b_s, d_bias, d_score = logits(b_s, x, i_b, i_h, o_m[None, :], o_n[:, None], MASKED)
    o_row = (i_b * x.heads + i_h).to(tl.int64) * x.queries + o_m
    pivot, log_z, centre, d_entropy = load_above(above, o_row, o_m < x.queries, MASKED)
    b_dp = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if above.d_out is not None:
        p_do = head_of(above.d_out, i_b, i_h)
        b_do = load_rows(p_do, above.d_out, start_m, x.queries, x.dv, BLOCK_M, BLOCK_DV, MASKED)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision="ieee")
    if above.d_probes is not None:
        p_df = head_of(above.d_probes, i_b, i_h)
        b_df = load_rows(p_df, above.d_probes, start_m, x.queries, x.g, BLOCK_M, BLOCK_G, MASKED)
        b_dp = tl.dot(b_f, tl.trans(b_df), b_dp, input_precision=above.precision)
    b_a, b_ds = gradient(
        b_s, b_dp, x, above, pivot[None, :], log_z[None, :], centre[None, :], d_entropy[None, :], MASKED
    )
    if wanted.v is not None:
        dv = tl.dot(b_a.to(b_do.dtype), b_do, dv, input_precision="ieee")
    if (wanted.f is not None) or (wanted.f_heads is not None):
        df = tl.dot(b_a, b_df, df, input_precision=above.precision)
    if wanted.columns is not None:
        column += tl.sum(b_ds * d_bias, 1)
    if wanted.k is not None:
        dk = tl.dot((b_ds * d_score).to(b_q.dtype), b_q, dk, input_precision="ieee")
    return dk, dv, df, column


@triton.jit
def key_gradient_kernel(
    x, schedule, above, wanted, parts,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """One program: one tile of keys, and one part of the query heads that read it. Grid (B * Hkv, tiles, parts)."""
    i_bn = tl.program_id(0).to(tl.int64)
    i_n = tl.program_id(1)
    part = tl.program_id(2)
    key_heads = x.heads // x.group
    i_b = i_bn // key_heads
    i_head = i_bn % key_heads
    start_n = i_n * BLOCK_N
    b_k = load_rows(head_of(x.k, i_b, i_head), x.k, start_n, x.keys, x.d, BLOCK_N, BLOCK_D, True)
    b_v = b_k
    if above.d_out is not None:
        b_v = load_rows(head_of(x.v, i_b, i_head), x.v, start_n, x.keys, x.dv, BLOCK_N, BLOCK_DV, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    df = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)
    for i_g in range(part * x.group // parts, (part + 1) * x.group // parts):
        i_h = i_head * x.group + i_g
        b_f = b_k
        if above.d_probes is not None:
            b_f = load_rows(head_of(x.f, i_b, i_h), x.f, start_n, x.keys, x.g, BLOCK_N, BLOCK_G, True)
        column = tl.zeros([BLOCK_N], tl.float32)
        full, every, low, clear_low = plan_queries(x, schedule, i_b, i_h, i_n, BLOCK_M, BLOCK_N)
        for t in range(full):
            start_m = query_tile(t, schedule, i_b, i_h, i_n, full, low, clear_low, True) * BLOCK_M
            dk, dv, df, column = _visit_queries(
                dk, dv, df, b_k, b_v, b_f, x, above, wanted, column, i_b, i_h, start_m, start_n,
                False, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_G,
            )  # fmt: skip
        for t in range(full, every):
            start_m = query_tile(t, schedule, i_b, i_h, i_n, full, low, clear_low, False) * BLOCK_M
            dk, dv, df, column = _visit_queries(
                dk, dv, df, b_k, b_v, b_f, x, above, wanted, column, i_b, i_h, start_m, start_n,
                True, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_G,
            )  # fmt: skip
        i_bh = i_b * x.heads + i_h
        if wanted.f_heads is not None:
            store_rows(wanted.f_heads, df, i_bh, start_n, x.keys, x.g, BLOCK_N, BLOCK_G)
            df = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)
        if wanted.columns is not None:
            o_n = start_n + tl.arange(0, BLOCK_N)
            tl.store(wanted.columns + i_bh * x.keys + o_n, column, mask=o_n < x.keys)
    i_out = part * tl.num_programs(0).to(tl.int64) + i_bn
    if wanted.k is not None:
        store_rows(wanted.k, dk * x.scale, i_out, start_n, x.keys, x.d, BLOCK_N, BLOCK_D)
    if wanted.v is not None:
        store_rows(wanted.v, dv, i_out, start_n, x.keys, x.dv, BLOCK_N, BLOCK_DV)
    if wanted.f is not None:
        store_rows(wanted.f, df, i_out, start_n, x.keys, x.g, BLOCK_N, BLOCK_G)

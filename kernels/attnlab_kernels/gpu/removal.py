"""What each row loses with one key: one pass over the keys that parts a row's largest entry from the others.

The loss change f = -A (G - sum A G) / (1 - A) loses its digits where A is near 1, which only a row's largest entry
can be. Without that entry the row's output is a softmax of the others, so these are summed with a pivot of their own:
Z over the others and D = sum e^(s-m) G. When the largest entry is beaten it joins them. Pivots as in `forward.py`.
"""

# triton's own decorators and scalars carry no types
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnlab_kernels.gpu.scores import head_of, load_columns, load_rows, logits
from attnlab_kernels.gpu.tiles import key_tile, plan_keys


class Removal(NamedTuple):
    """What the loss change needs of each row, [B, Hq, Nq].

    Attributes:
        total: sum of A G.
        largest: int32, the key of the largest entry.
        others: the mean of G without it, a learned sink counted in with a G of 0.
    """

    total: Any
    largest: Any
    others: Any


@triton.jit
def _visit(
    top, top_g, largest, pivot, z, d, b_q, b_do, x, p_k, p_v, i_b, i_h, i_m, start,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to a tile of queries."""
    o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    o_n = start + tl.arange(0, BLOCK_N)
    b_k = load_columns(p_k, x.k, start, x.keys, x.d, BLOCK_N, BLOCK_D, MASKED)
    b_s = tl.dot(b_q, b_k, input_precision="ieee")
    b_s, _, _ = logits(b_s, x, i_b, i_h, o_m, o_n[None, :], MASKED)
    b_v = load_columns(p_v, x.v, start, x.keys, x.dv, BLOCK_N, BLOCK_DV, MASKED)
    b_g = tl.dot(b_do, b_v, input_precision="ieee")
    here_top = tl.max(b_s, 1)
    here = start + tl.argmax(b_s, 1)
    is_top = o_n[None, :] == here[:, None]
    here_g = tl.sum(tl.where(is_top, b_g, 0.0), 1)
    b_s = tl.where(is_top, -float("inf"), b_s)
    wins = here_top > top
    # Of the two largest entries the smaller one joins the others.
    beaten = tl.where(wins, top, here_top)
    beaten_g = tl.where(wins, top_g, here_g)
    new_pivot = tl.maximum(pivot, tl.maximum(tl.max(b_s, 1), beaten) * x.c)
    safe = tl.where(new_pivot == -float("inf"), 0.0, new_pivot)
    r = tl.exp2(pivot - safe)
    b_p = tl.exp2(tl.fma(b_s, x.c, -safe[:, None]))
    p_beaten = tl.exp2(tl.fma(beaten, x.c, -safe))
    z = r * z + tl.sum(b_p, 1) + p_beaten
    d = r * d + tl.sum(b_p * b_g, 1) + p_beaten * beaten_g
    return (
        tl.maximum(top, here_top), tl.where(wins, here_g, top_g), tl.where(wins, here, largest), new_pivot, z, d,
    )  # fmt: skip


@triton.jit
def removal_kernel(
    x, grad_out, schedule, pivots, log_zs, removal,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program: one tile of queries of one head. Grid (B * Hq, tiles). Softmax only.

    A row whose largest entry is all it has gets a pivot of +inf: its entries of f are 0.
    """
    i_bh = tl.program_id(0).to(tl.int64)
    i_b = i_bh // x.heads
    i_h = i_bh % x.heads
    i_m = tl.program_id(1)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    b_q = load_rows(head_of(x.q, i_b, i_h), x.q, i_m * BLOCK_M, x.queries, x.d, BLOCK_M, BLOCK_D, True)
    p_do = head_of(grad_out, i_b, i_h)
    b_do = load_rows(p_do, grad_out, i_m * BLOCK_M, x.queries, x.dv, BLOCK_M, BLOCK_DV, True)
    p_k = head_of(x.k, i_b, i_h // x.group)
    p_v = head_of(x.v, i_b, i_h // x.group)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    top_g = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], -1, tl.int32)
    pivot = tl.full([BLOCK_M], -float("inf"), tl.float32)
    z = tl.zeros([BLOCK_M], tl.float32)
    d = tl.zeros([BLOCK_M], tl.float32)
    full, every, h0, h1, w0, w1, w2 = plan_keys(x, schedule, i_b, i_h, i_m, BLOCK_M, BLOCK_N)
    for t in range(full):
        start = key_tile(t, schedule, i_b, i_h, i_m, full, h0, h1, w0, w1, w2, True) * BLOCK_N
        top, top_g, largest, pivot, z, d = _visit(
            top, top_g, largest, pivot, z, d, b_q, b_do, x, p_k, p_v, i_b, i_h, i_m, start,
            False, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    for t in range(full, every):
        start = key_tile(t, schedule, i_b, i_h, i_m, full, h0, h1, w0, w1, w2, False) * BLOCK_N
        top, top_g, largest, pivot, z, d = _visit(
            top, top_g, largest, pivot, z, d, b_q, b_do, x, p_k, p_v, i_b, i_h, i_m, start,
            True, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip

    if x.sinks is not None:
        sink = tl.load(x.sinks + i_h) * 1.4426950408889634
        new_pivot = tl.maximum(pivot, sink)
        safe = tl.where(new_pivot == -float("inf"), 0.0, new_pivot)
        r = tl.exp2(pivot - safe)
        z = r * z + tl.exp2(sink - safe)
        d = r * d
        pivot = new_pivot
    alone = z == 0.0
    row_pivot = tl.maximum(top * x.c, pivot)
    row_pivot = tl.where(row_pivot == -float("inf"), 0.0, row_pivot)
    r = tl.exp2(pivot - row_pivot)
    p_top = tl.exp2(tl.fma(top, x.c, -row_pivot))
    row_z = p_top + r * z
    safe_z = tl.where(row_z == 0.0, 1.0, row_z)
    in_rows = o_m < x.queries
    o_row = i_bh * x.queries + o_m
    tl.store(pivots + o_row, tl.where(alone, float("inf"), row_pivot), mask=in_rows)
    tl.store(log_zs + o_row, tl.log2(safe_z), mask=in_rows)
    tl.store(removal.total + o_row, (p_top * top_g + r * d) / safe_z, mask=in_rows)
    tl.store(removal.largest + o_row, largest, mask=in_rows)
    tl.store(removal.others + o_row, tl.where(alone, 0.0, d / tl.where(alone, 1.0, z)), mask=in_rows)

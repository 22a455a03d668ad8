"""One tile of a backward: the pattern, recomputed from q, k and what the forward kept of each row, and its gradient.

With t = ln P of the shares P, dP = dO V^T + dF F^T, delta = rowsum(dO * O) + rowsum(dF * F_out) and H the entropy, the
logits of a softmax get ds = P (dP - (delta - dLSE + dH H) - dH t): FlashAttention-2's (arXiv 2307.08691) with one more
multiply-add for the entropy. The sigmoid normaliser reads A unnormalised while lse and entropy are of the shares, so
ds = A dP - P (dH H - dLSE) - P dH t. Times the derivatives of cap and normaliser that gives biases, queries and keys.

Here a row is masked by visibility alone: one that `query_mask` leaves out has an output too.
"""

# triton's own decorators and scalars carry no types
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnlab_kernels.gpu.scores import head_of, load_rows, log_shares


class Above(NamedTuple):
    """What the forward kept of each row and what gradients reach it; None compiles out.

    Attributes:
        d_out, d_probes: gradients of the output and of the key probes' product, [b, h, i, dv] and [b, h, i, g].
        pivot, log_z: [B, Hq, Nq], the row's normaliser.
        centre: [B, Hq, Nq], delta - dLSE + dH H; without delta under the sigmoid normaliser.
        d_entropy: [B, Hq, Nq], dH ln 2, since exponents are of two.
        precision: constexpr, how products with probes are taken. Triton 3.6 loses what is constant in tuples within a
            tuple, strides of 1 too, unless a field behind them is constexpr.
    """

    d_out: Any
    d_probes: Any
    pivot: Any
    log_z: Any
    centre: Any
    d_entropy: Any
    precision: Any


@triton.jit
def delta_kernel(
    x, d_out, out, d_probes, probes, delta, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_G: tl.constexpr
):
    """rowsum(dO * O) + rowsum(dF * F_out), either of which may be absent. Grid (B * Hq, tiles)."""
    i_bh = tl.program_id(0).to(tl.int64)
    i_b = i_bh // x.heads
    i_h = i_bh % x.heads
    start = tl.program_id(1) * BLOCK_M
    sums = tl.zeros([BLOCK_M], tl.float32)
    if d_out is not None:
        b_d = load_rows(head_of(d_out, i_b, i_h), d_out, start, x.queries, x.dv, BLOCK_M, BLOCK_DV, True)
        b_o = load_rows(head_of(out, i_b, i_h), out, start, x.queries, x.dv, BLOCK_M, BLOCK_DV, True)
        sums += tl.sum(b_d.to(tl.float32) * b_o.to(tl.float32), 1)
    if d_probes is not None:
        b_d = load_rows(head_of(d_probes, i_b, i_h), d_probes, start, x.queries, x.g, BLOCK_M, BLOCK_G, True)
        b_o = load_rows(head_of(probes, i_b, i_h), probes, start, x.queries, x.g, BLOCK_M, BLOCK_G, True)
        sums += tl.sum(b_d.to(tl.float32) * b_o.to(tl.float32), 1)
    o_m = start + tl.arange(0, BLOCK_M)
    tl.store(delta + i_bh * x.queries + o_m, sums, mask=o_m < x.queries)


@triton.jit
def _load_row(p, o_row, in_rows, EDGE: tl.constexpr):
    if EDGE:
        return tl.load(p + o_row, mask=in_rows, other=0.0)
    return tl.load(p + o_row)


@triton.jit
def load_above(above, o_row, in_rows, EDGE: tl.constexpr):
    """Pivot, ln Z, centre and dH of some rows; those that nothing reads are left at 0."""
    pivot = _load_row(above.pivot, o_row, in_rows, EDGE)
    log_z = _load_row(above.log_z, o_row, in_rows, EDGE)
    centre = pivot
    d_entropy = pivot
    if above.centre is not None:
        centre = _load_row(above.centre, o_row, in_rows, EDGE)
    if above.d_entropy is not None:
        d_entropy = _load_row(above.d_entropy, o_row, in_rows, EDGE)
    return pivot, log_z, centre, d_entropy


@triton.jit
def gradient(b_s, b_dp, x, above, pivot, log_z, centre, d_entropy, MASKED: tl.constexpr):
    """The pattern A of a tile and the gradient of its logits; rows broadcast to the tile."""
    # Only where entries may be hidden is there a P of 0 whose t is -inf.
    GUARDED: tl.constexpr = MASKED or x.bias is not None
    b_a = b_s
    if x.sigmoid:
        b_a = tl.exp2(b_s * x.c)
        b_ds = b_a * b_dp
        if above.centre is not None:
            b_t = log_shares(b_s, x, pivot, log_z)
            b_p = tl.exp2(b_t)
            b_inner = centre
            if above.d_entropy is not None:
                b_inner += d_entropy * (tl.where(b_p == 0.0, 0.0, b_t) if GUARDED else b_t)
            b_ds -= b_p * b_inner
    else:
        b_t = log_shares(b_s, x, pivot, log_z)
        b_a = tl.exp2(b_t)
        b_inner = b_dp - centre
        if above.d_entropy is not None:
            b_inner -= d_entropy * (tl.where(b_a == 0.0, 0.0, b_t) if GUARDED else b_t)
        b_ds = b_a * b_inner
    if GUARDED:
        # A row that sees no key may be given a gradient of its lse of -inf that is no number.
        b_ds = tl.where(b_s == -float("inf"), 0.0, b_ds)
    return b_a, b_ds


@triton.jit
def store_rows(p, values, i_row, start, size, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write a tile of a contiguous [rows, size, D] tensor."""
    o = start + tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_D)
    at = p + (i_row * size + o)[:, None] * D + o_d[None, :]
    tl.store(at, values.to(p.dtype.element_ty), mask=(o[:, None] < size) & (o_d[None, :] < D))

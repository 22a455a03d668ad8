"""Forward kernels: output, row statistics and key probes in one pass over the keys.

A program holds a tile of queries and walks over the keys, as FlashAttention-2 does (arXiv 2307.08691), with centred
sums a row: m the running maximum, Z = sum e^(s-m), U = sum e^(s-m) (s-m), W = sum e^(2(s-m)). When the maximum moves
by d, with r = e^d: U <- r (U + d Z), Z <- r Z, W <- r^2 W. Tiles without hidden entries run in a loop of their own,
where each statistic contracts to one multiply-add a score.

With few queries the keys are split over programs, and a second kernel merges their sums by the same rule
(Flash-Decoding). `m` is in units of the logits, its pivot m c is rounded once and carried along: recomputed, it would
contract with the subtraction into something else. U is kept in powers of two.
"""

# triton's own decorators and scalars carry no types
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnlab_kernels.gpu.scores import head_of, load_columns, load_rows, logits
from attnlab_kernels.gpu.tiles import key_tile, plan_keys


class Outputs(NamedTuple):
    """Where a forward writes, contiguous [B, Hq, Nq, ...]; None compiles out.

    `pivot` and `log_z` [B, Hq, Nq] are what later passes need of each row: A = 2^(s c - pivot - log_z).
    """

    out: Any
    lse: Any
    entropy: Any
    max_probability: Any
    argmax: Any
    collision: Any
    visible: Any
    learned_sink_mass: Any
    probes: Any
    pivot: Any
    log_z: Any


class Partials(NamedTuple):
    """Sums of each part of the keys, [parts, B * Hq * Nq, ...] in float32; `best` and `seen` in int32."""

    acc: Any
    acc_f: Any
    m: Any
    pivot: Any
    z: Any
    u: Any
    w: Any
    best: Any
    seen: Any


@triton.jit
def _visit(
    acc, acc_f, m, pivot, z, u, w, best, seen, b_q, x, wanted, p_k, p_v, p_f, i_b, i_h, i_m, start,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_G: tl.constexpr, PROBE_PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to a tile of queries."""
    o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    o_n = start + tl.arange(0, BLOCK_N)
    b_k = load_columns(p_k, x.k, start, x.keys, x.d, BLOCK_N, BLOCK_D, MASKED)
    b_s = tl.dot(b_q, b_k, input_precision="ieee")
    b_s, _, _ = logits(b_s, x, i_b, i_h, o_m, o_n[None, :], MASKED)
    # Only where entries may be hidden, by a mask or a bias, is there a p of 0 whose t is -inf.
    GUARDED: tl.constexpr = MASKED or not x.raw
    if wanted.visible is not None:
        seen += tl.sum((b_s != -float("inf")).to(tl.int32), 1) if GUARDED else BLOCK_N
    top = tl.max(b_s, 1)
    if wanted.argmax is not None:
        # Tiles come in any order: of equal entries the first key is the answer.
        here = start + tl.argmax(b_s, 1)
        better = (top > m) | ((top == m) & (top != -float("inf")) & (here < best))
        best = tl.where(better, here, best)
    m = tl.maximum(m, top)
    # The larger of two rounded products, which is m c rounded. Written as m * c it contracts with the subtraction below
    # (PTX: fma.rn(-c, m, pivot)), and every tile that moves nothing would rescale by the rounding error.
    new_pivot = tl.maximum(pivot, top * x.c)
    safe = tl.where(new_pivot == -float("inf"), 0.0, new_pivot) if GUARDED else new_pivot
    # 2^-256 is 0 in float32: the bound changes nothing but -inf, which times a z of 0 would be NaN.
    moved = tl.maximum(pivot - safe, -256.0)
    r = tl.exp2(moved)
    b_t = tl.fma(b_s, x.c, -safe[:, None])
    b_p = tl.exp2(b_t)
    if wanted.entropy is not None:
        b_finite = tl.maximum(b_t, -256.0) if GUARDED else b_t
        u = r * (u + moved * z) + tl.sum(b_p * b_finite, 1)
    if wanted.collision is not None:
        w = r * r * w + tl.sum(b_p * b_p, 1)
    z = r * z + tl.sum(b_p, 1)
    if wanted.out is not None:
        b_v = load_rows(p_v, x.v, start, x.keys, x.dv, BLOCK_N, BLOCK_DV, MASKED)
        acc = acc * r[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
    if wanted.probes is not None:
        b_f = load_rows(p_f, x.f, start, x.keys, x.g, BLOCK_N, BLOCK_G, MASKED)
        acc_f = acc_f * r[:, None] + tl.dot(b_p, b_f, input_precision=PROBE_PRECISION)
    return acc, acc_f, m, new_pivot, z, u, w, best, seen


@triton.jit
def _exponential_of_largest(m, pivot, c):
    """2^(m c - pivot): almost 1, and not 1, since the pivot is m c rounded. 0 where there is no key."""
    none = m == -float("inf")
    return tl.where(none, 0.0, tl.exp2(tl.fma(tl.where(none, 0.0, m), c, -tl.where(none, 0.0, pivot))))


@triton.jit
def _finish(
    acc, acc_f, m, pivot, z, u, w, best, seen, x, wanted, i_bh, i_m,
    BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Turn a tile's sums into what was asked for and write it. A learned sink is one more logit, added here."""
    LN2: tl.constexpr = 0.6931471805599453
    # One 64-bit number, not one a row: those would be kept through the loops for the sake of this end.
    base = i_bh * x.queries + i_m * BLOCK_M
    o_m = tl.arange(0, BLOCK_M)
    in_rows = i_m * BLOCK_M + o_m < x.queries
    largest = 0.0 if wanted.max_probability is None else _exponential_of_largest(m, pivot, x.c)
    if x.sinks is not None:
        sink = tl.load(x.sinks + i_bh % x.heads) * 1.4426950408889634
        top = pivot
        pivot = tl.maximum(top, sink)
        pivot = tl.where(pivot == -float("inf"), 0.0, pivot)
        r = tl.exp2(top - pivot)
        moved = tl.where(top == -float("inf"), 0.0, top - pivot)
        t_sink = tl.where(sink == -float("inf"), 0.0, sink - pivot)
        p_sink = tl.where(sink == -float("inf"), 0.0, tl.exp2(sink - pivot))
        u = r * (u + moved * z) + p_sink * t_sink
        w = r * r * w
        z = r * z + p_sink
    else:
        r = 1.0
        p_sink = 0.0
        pivot = tl.where(pivot == -float("inf"), 0.0, pivot)
    empty = z == 0.0
    safe_z = tl.where(empty, 1.0, z)
    inverse = tl.where(empty, 0.0, 1.0 / safe_z)
    log_z = tl.log2(safe_z)
    if x.sigmoid:
        to_weights = tl.where(empty, 0.0, tl.exp2(pivot))
    else:
        to_weights = inverse * r
    if wanted.out is not None:
        o_dv = tl.arange(0, BLOCK_DV)
        at = wanted.out + base * x.dv + (o_m[:, None] * x.dv + o_dv[None, :])
        b_o = (acc * to_weights[:, None]).to(wanted.out.dtype.element_ty)
        tl.store(at, b_o, mask=in_rows[:, None] & (o_dv[None, :] < x.dv))
    if wanted.probes is not None:
        o_g = tl.arange(0, BLOCK_G)
        at = wanted.probes + base * x.g + (o_m[:, None] * x.g + o_g[None, :])
        tl.store(at, acc_f * to_weights[:, None], mask=in_rows[:, None] & (o_g[None, :] < x.g))
    if wanted.lse is not None:
        tl.store(wanted.lse + base + o_m, tl.where(empty, -float("inf"), (pivot + log_z) * LN2), mask=in_rows)
    if wanted.entropy is not None:
        tl.store(wanted.entropy + base + o_m, tl.where(empty, 0.0, LN2 * (log_z - u * inverse)), mask=in_rows)
    if wanted.max_probability is not None:
        tl.store(wanted.max_probability + base + o_m, inverse * r * largest, mask=in_rows)
    if wanted.argmax is not None:
        tl.store(wanted.argmax + base + o_m, best.to(tl.int64), mask=in_rows)
    if wanted.collision is not None:
        tl.store(wanted.collision + base + o_m, w * inverse * inverse, mask=in_rows)
    if wanted.visible is not None:
        tl.store(wanted.visible + base + o_m, seen.to(tl.float32), mask=in_rows)
    if wanted.learned_sink_mass is not None:
        tl.store(wanted.learned_sink_mass + base + o_m, p_sink * inverse, mask=in_rows)
    if wanted.pivot is not None:
        tl.store(wanted.pivot + base + o_m, pivot, mask=in_rows)
        tl.store(wanted.log_z + base + o_m, log_z, mask=in_rows)


@triton.jit
def forward_kernel(
    x, schedule, wanted, partials, parts,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_G: tl.constexpr, PROBE_PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One program: one tile of queries of one head, and one part of the keys. Grid (B * Hq, tiles, parts).

    With `SPLIT` there are several parts, and `partials` to write to. Triton 3.6 cannot ask whether a tuple that holds
    a None is one.
    """
    i_bh = tl.program_id(0).to(tl.int64)
    i_b = i_bh // x.heads
    i_h = i_bh % x.heads
    i_m = tl.program_id(1)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    b_q = load_rows(head_of(x.q, i_b, i_h), x.q, i_m * BLOCK_M, x.queries, x.d, BLOCK_M, BLOCK_D, True)
    p_k = head_of(x.k, i_b, i_h // x.group)
    p_v = head_of(x.v, i_b, i_h // x.group)
    p_f = p_v
    if x.f is not None:
        p_f = head_of(x.f, i_b, i_h)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    acc_f = tl.zeros([BLOCK_M, BLOCK_G], tl.float32)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    pivot = tl.full([BLOCK_M], -float("inf"), tl.float32)
    z = tl.zeros([BLOCK_M], tl.float32)
    u = tl.zeros([BLOCK_M], tl.float32)
    w = tl.zeros([BLOCK_M], tl.float32)
    best = tl.full([BLOCK_M], -1, tl.int32)
    seen = tl.zeros([BLOCK_M], tl.int32)

    full, every, h0, h1, w0, w1, w2 = plan_keys(x, schedule, i_b, i_h, i_m, BLOCK_M, BLOCK_N)
    first = 0
    clear = full
    last = every
    mixed = full
    if SPLIT:
        part = tl.program_id(2)
        first = full * part // parts
        clear = full * (part + 1) // parts
        mixed = full + (every - full) * part // parts
        last = full + (every - full) * (part + 1) // parts
    for t in range(first, clear):
        start = key_tile(t, schedule, i_b, i_h, i_m, full, h0, h1, w0, w1, w2, True) * BLOCK_N
        acc, acc_f, m, pivot, z, u, w, best, seen = _visit(
            acc, acc_f, m, pivot, z, u, w, best, seen, b_q, x, wanted, p_k, p_v, p_f, i_b, i_h, i_m, start,
            False, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_G, PROBE_PRECISION,
        )  # fmt: skip
    for t in range(mixed, last):
        start = key_tile(t, schedule, i_b, i_h, i_m, full, h0, h1, w0, w1, w2, False) * BLOCK_N
        acc, acc_f, m, pivot, z, u, w, best, seen = _visit(
            acc, acc_f, m, pivot, z, u, w, best, seen, b_q, x, wanted, p_k, p_v, p_f, i_b, i_h, i_m, start,
            True, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_G, PROBE_PRECISION,
        )  # fmt: skip
    if not SPLIT:
        _finish(acc, acc_f, m, pivot, z, u, w, best, seen, x, wanted, i_bh, i_m, BLOCK_M, BLOCK_DV, BLOCK_G)
    else:
        rows = tl.num_programs(0).to(tl.int64) * x.queries
        o_row = tl.program_id(2) * rows + i_bh * x.queries + o_m
        in_rows = o_m < x.queries
        tl.store(partials.m + o_row, m, mask=in_rows)
        tl.store(partials.pivot + o_row, pivot, mask=in_rows)
        tl.store(partials.z + o_row, z, mask=in_rows)
        tl.store(partials.u + o_row, u, mask=in_rows)
        tl.store(partials.w + o_row, w, mask=in_rows)
        tl.store(partials.best + o_row, best, mask=in_rows)
        tl.store(partials.seen + o_row, seen, mask=in_rows)
        if wanted.out is not None:
            o_dv = tl.arange(0, BLOCK_DV)
            at = partials.acc + o_row[:, None] * x.dv + o_dv[None, :]
            tl.store(at, acc, mask=in_rows[:, None] & (o_dv[None, :] < x.dv))
        if wanted.probes is not None:
            o_g = tl.arange(0, BLOCK_G)
            at = partials.acc_f + o_row[:, None] * x.g + o_g[None, :]
            tl.store(at, acc_f, mask=in_rows[:, None] & (o_g[None, :] < x.g))


@triton.jit
def merge_kernel(
    x, wanted, partials, parts, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Merge the parts of a tile of queries, in order. Grid (B * Hq, tiles)."""
    i_bh = tl.program_id(0).to(tl.int64)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = o_m < x.queries
    rows = tl.num_programs(0).to(tl.int64) * x.queries
    o_dv = tl.arange(0, BLOCK_DV)
    o_g = tl.arange(0, BLOCK_G)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    acc_f = tl.zeros([BLOCK_M, BLOCK_G], tl.float32)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    pivot = tl.full([BLOCK_M], -float("inf"), tl.float32)
    z = tl.zeros([BLOCK_M], tl.float32)
    u = tl.zeros([BLOCK_M], tl.float32)
    w = tl.zeros([BLOCK_M], tl.float32)
    best = tl.full([BLOCK_M], -1, tl.int32)
    seen = tl.zeros([BLOCK_M], tl.int32)
    for part in range(parts):
        o_row = part * rows + i_bh * x.queries + o_m
        other_m = tl.load(partials.m + o_row, mask=in_rows, other=-float("inf"))
        other_pivot = tl.load(partials.pivot + o_row, mask=in_rows, other=-float("inf"))
        other_z = tl.load(partials.z + o_row, mask=in_rows, other=0.0)
        other_u = tl.load(partials.u + o_row, mask=in_rows, other=0.0)
        other_w = tl.load(partials.w + o_row, mask=in_rows, other=0.0)
        other_best = tl.load(partials.best + o_row, mask=in_rows, other=-1)
        seen += tl.load(partials.seen + o_row, mask=in_rows, other=0)
        better = (other_m > m) | ((other_m == m) & (other_m != -float("inf")) & (other_best < best))
        best = tl.where(better, other_best, best)
        m = tl.maximum(m, other_m)
        new_pivot = tl.maximum(pivot, other_pivot)
        safe = tl.where(new_pivot == -float("inf"), 0.0, new_pivot)
        moved = tl.where(pivot == -float("inf"), 0.0, pivot - safe)
        other_moved = tl.where(other_pivot == -float("inf"), 0.0, other_pivot - safe)
        r = tl.exp2(pivot - safe)
        other_r = tl.exp2(other_pivot - safe)
        pivot = new_pivot
        u = r * (u + moved * z) + other_r * (other_u + other_moved * other_z)
        w = r * r * w + other_r * other_r * other_w
        z = r * z + other_r * other_z
        if wanted.out is not None:
            at = partials.acc + o_row[:, None] * x.dv + o_dv[None, :]
            b_o = tl.load(at, mask=in_rows[:, None] & (o_dv[None, :] < x.dv), other=0.0)
            acc = acc * r[:, None] + b_o * other_r[:, None]
        if wanted.probes is not None:
            at = partials.acc_f + o_row[:, None] * x.g + o_g[None, :]
            b_f = tl.load(at, mask=in_rows[:, None] & (o_g[None, :] < x.g), other=0.0)
            acc_f = acc_f * r[:, None] + b_f * other_r[:, None]
    _finish(acc, acc_f, m, pivot, z, u, w, best, seen, x, wanted, i_bh, tl.program_id(1), BLOCK_M, BLOCK_DV, BLOCK_G)

"""Backend `triton`: output, row statistics and key probes in one pass, for causal and full masks.

A program holds a tile of queries and walks over the keys, as FlashAttention-2 does (arXiv 2307.08691), with centred
sums a row: m the running maximum, Z = sum e^(s-m), U = sum e^(s-m) (s-m), W = sum e^(2(s-m)). When the maximum moves
by d, with r = e^d: U <- r (U + d Z), Z <- r Z, W <- r^2 W. Tiles without hidden entries run in a loop of their own,
where each statistic contracts to one multiply-add a score. Every option is a constexpr and compiles out.

Exponents are fma(s, c, -m c) with c = scale log2(e): s c is never rounded by itself, and the rounding of m c, the same
for a whole row, cancels. Only this module imports triton, so the package works where triton is missing.
"""

# triton's own decorators and scalars carry no types
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnlab_kernels.counts import keys_seen
from attnlab_kernels.emit import Emitted
from attnlab_kernels.errors import UnsupportedError
from attnlab_kernels.problem import Problem
from attnlab_kernels.request import Request

MAX_PROBES = 128
"""Most probe columns of one launch: their float32 accumulator shares the registers with the output's."""


@triton.jit
def _visit(
    acc, acc_f, m, z, u, w, best, b_q, p_k, p_v, p_f, o_n, o_m, n_keys, offset,
    s_kn, s_kd, s_vn, s_vd, s_fn, s_fg, o_d, o_dv, o_g, n_d, n_dv, n_g, c,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, ENTROPY: tl.constexpr, COLLISION: tl.constexpr,
    ARGMAX: tl.constexpr, PROBES: tl.constexpr, PROBE_PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to a tile of queries. m is in units of q . k; exponents are in powers of two."""
    in_range = o_n < n_keys
    m_k = o_d[:, None] < n_d
    m_v = o_dv[None, :] < n_dv
    m_f = o_g[None, :] < n_g
    if MASKED:
        m_k = m_k & in_range[None, :]
        m_v = m_v & in_range[:, None]
        m_f = m_f & in_range[:, None]
    o_n64 = o_n.to(tl.int64)
    b_k = tl.load(p_k + o_n64[None, :] * s_kn + o_d[:, None] * s_kd, mask=m_k, other=0.0)
    b_s = tl.dot(b_q, b_k, input_precision="ieee")
    if MASKED:
        seen = in_range[None, :]
        if CAUSAL:
            seen = seen & (o_n[None, :] <= o_m[:, None] + offset)
        b_s = tl.where(seen, b_s, -float("inf"))
    top = tl.max(b_s, 1)
    if ARGMAX:
        best = tl.where(top > m, tl.min(o_n, 0) + tl.argmax(b_s, 1), best)
    new_m = tl.maximum(m, top)
    pivot = tl.where(new_m == -float("inf"), 0.0, new_m) * c
    moved = tl.where(m == -float("inf"), 0.0, m * c - pivot)
    r = tl.exp2(m * c - pivot)
    b_t = tl.fma(b_s, c, -pivot[:, None])
    b_p = tl.exp2(b_t)
    if ENTROPY:
        # A hidden entry has p = 0 and t = -inf.
        b_finite = tl.where(b_s == -float("inf"), 0.0, b_t) if MASKED else b_t
        u = r * (u + moved * z) + tl.sum(b_p * b_finite, 1)
    if COLLISION:
        w = r * r * w + tl.sum(b_p * b_p, 1)
    z = r * z + tl.sum(b_p, 1)
    b_v = tl.load(p_v + o_n64[:, None] * s_vn + o_dv[None, :] * s_vd, mask=m_v, other=0.0)
    acc = acc * r[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
    if PROBES:
        b_f = tl.load(p_f + o_n64[:, None] * s_fn + o_g[None, :] * s_fg, mask=m_f, other=0.0)
        acc_f = acc_f * r[:, None] + tl.dot(b_p, b_f, input_precision=PROBE_PRECISION)
    return acc, acc_f, new_m, z, u, w, best


@triton.jit
def attention_forward_kernel(
    q, k, v, f, out, lse, entropy, max_probability, argmax, collision, probes,
    s_qb, s_qh, s_qn, s_qd, s_kb, s_kh, s_kn, s_kd, s_vb, s_vh, s_vn, s_vd, s_fb, s_fh, s_fn, s_fg,
    n_heads, n_queries, n_keys, offset, n_d, n_dv, n_g, c,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, LSE: tl.constexpr, ENTROPY: tl.constexpr,
    MAX_PROBABILITY: tl.constexpr, ARGMAX: tl.constexpr, COLLISION: tl.constexpr, PROBES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_G: tl.constexpr,
    PROBE_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one tile of queries of one head. Outputs are contiguous [B, Hq, Nq, ...]."""
    LN2: tl.constexpr = 0.6931471805599453
    i_m = tl.program_id(1)
    i_bh = tl.program_id(0).to(tl.int64)
    i_b = i_bh // n_heads
    i_h = i_bh % n_heads
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    o_g = tl.arange(0, BLOCK_G)
    in_rows = o_m < n_queries
    p_q = q + i_b * s_qb + i_h * s_qh
    p_k = k + i_b * s_kb + (i_h // GROUP) * s_kh
    p_v = v + i_b * s_vb + (i_h // GROUP) * s_vh
    p_f = f + i_b * s_fb + i_h * s_fh
    m_q = in_rows[:, None] & (o_d[None, :] < n_d)
    b_q = tl.load(p_q + o_m[:, None].to(tl.int64) * s_qn + o_d[None, :] * s_qd, mask=m_q, other=0.0)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    acc_f = tl.zeros([BLOCK_M, BLOCK_G], tl.float32)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    z = tl.zeros([BLOCK_M], tl.float32)
    u = tl.zeros([BLOCK_M], tl.float32)
    w = tl.zeros([BLOCK_M], tl.float32)
    best = tl.full([BLOCK_M], -1, tl.int32)

    stop = n_keys
    clear = n_keys
    if CAUSAL:
        stop = tl.minimum(n_keys, tl.maximum(0, (i_m + 1) * BLOCK_M + offset))
        clear = tl.minimum(n_keys, tl.maximum(0, i_m * BLOCK_M + offset + 1))
    clear = clear // BLOCK_N * BLOCK_N
    for start in range(0, clear, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        acc, acc_f, m, z, u, w, best = _visit(
            acc, acc_f, m, z, u, w, best, b_q, p_k, p_v, p_f, o_n, o_m, n_keys, offset,
            s_kn, s_kd, s_vn, s_vd, s_fn, s_fg, o_d, o_dv, o_g, n_d, n_dv, n_g, c,
            False, CAUSAL, ENTROPY, COLLISION, ARGMAX, PROBES, PROBE_PRECISION,
        )  # fmt: skip
    for start in range(clear, stop, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        acc, acc_f, m, z, u, w, best = _visit(
            acc, acc_f, m, z, u, w, best, b_q, p_k, p_v, p_f, o_n, o_m, n_keys, offset,
            s_kn, s_kd, s_vn, s_vd, s_fn, s_fg, o_d, o_dv, o_g, n_d, n_dv, n_g, c,
            True, CAUSAL, ENTROPY, COLLISION, ARGMAX, PROBES, PROBE_PRECISION,
        )  # fmt: skip

    empty = z == 0.0
    safe_z = tl.where(empty, 1.0, z)
    inverse = tl.where(empty, 0.0, 1.0 / safe_z)
    o_row = i_bh * n_queries + o_m
    m_o = in_rows[:, None] & (o_dv[None, :] < n_dv)
    p_out = out + o_row[:, None] * n_dv + o_dv[None, :]
    tl.store(p_out, (acc * inverse[:, None]).to(out.dtype.element_ty), mask=m_o)
    log_z = tl.log(safe_z)
    pivot = tl.where(empty, 0.0, m) * c
    if LSE:
        tl.store(lse + o_row, tl.where(empty, -float("inf"), pivot * LN2 + log_z), mask=in_rows)
    if ENTROPY:
        tl.store(entropy + o_row, tl.where(empty, 0.0, log_z - LN2 * u * inverse), mask=in_rows)
    if MAX_PROBABILITY:
        tl.store(max_probability + o_row, inverse * tl.exp2(tl.fma(tl.where(empty, 0.0, m), c, -pivot)), mask=in_rows)
    if ARGMAX:
        tl.store(argmax + o_row, best.to(tl.int64), mask=in_rows)
    if COLLISION:
        tl.store(collision + o_row, w * inverse * inverse, mask=in_rows)
    if PROBES:
        m_p = in_rows[:, None] & (o_g[None, :] < n_g)
        tl.store(probes + o_row[:, None] * n_g + o_g[None, :], acc_f * inverse[:, None], mask=m_p)


class Launch(NamedTuple):
    """Tile sizes and how a program is scheduled."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def choose_launch(d: int, dv: int, element_size: int, argmax: bool = False, probes: bool = False) -> Launch:
    """Tile sizes whose registers and shared memory fit a program for these head sizes.

    Args:
        d: columns of a query head.
        dv: columns of a value head.
        element_size: bytes of an element.
        argmax: whether the largest entry's key is tracked, which takes registers.
        probes: whether probe columns are read, whose accumulator takes registers.
    """
    widest = max(d, dv)
    if element_size > 2:
        return Launch(32, 32, 4, 2)
    if widest > 128:
        return Launch(64, 16, 8, 2)
    if probes:
        return Launch(128, 32, 8, 2)
    return Launch(128, 128 if widest <= 64 and not argmax else 64 if widest <= 64 or not argmax else 32, 8, 2)


def triton_attention(problem: Problem, request: Request) -> tuple[Tensor, Emitted]:
    """Output in q's dtype and row statistics in float32, on a GPU or in triton's interpreter.

    Raises:
        UnsupportedError: an option, a statistic or a device that this backend does not have, by name.
    """
    missing = unsupported(problem, request)
    if missing is not None:
        raise UnsupportedError(f"backend 'triton' does not support {missing} yet; use backend='tiled'.")
    q, k, v, emit, probes = problem.q, problem.k, problem.v, request.emit, problem.key_probes
    b, h, n_q, d = q.shape
    dv = v.shape[-1]
    n_g = 0 if probes is None else probes.shape[-1]
    out = torch.empty(b, h, n_q, dv, dtype=q.dtype, device=q.device)
    rows = {
        name: torch.empty(b, h, n_q, dtype=torch.int64 if name == "argmax" else torch.float32, device=q.device)
        for name in ("lse", "entropy", "max_probability", "argmax", "collision")
        if getattr(emit, name)
    }
    if probes is not None:
        rows["key_probes"] = torch.empty(b, h, n_q, n_g, dtype=torch.float32, device=q.device)
    columns = out if probes is None else probes.expand(b, h, -1, -1)
    launch = choose_launch(d, dv, q.element_size(), argmax=emit.argmax, probes=probes is not None)
    if out.numel():
        names = ("lse", "entropy", "max_probability", "argmax", "collision", "key_probes")
        attention_forward_kernel[(b * h, triton.cdiv(n_q, launch.block_m))](
            q, k, v, columns, out, *(rows.get(name, out) for name in names),
            *q.stride(), *k.stride(), *v.stride(), *columns.stride(),
            h, n_q, problem.keys, problem.offset, d, dv, n_g, problem.scale * math.log2(math.e),
            GROUP=problem.group, CAUSAL=problem.causal, LSE=emit.lse, ENTROPY=emit.entropy,
            MAX_PROBABILITY=emit.max_probability, ARGMAX=emit.argmax, COLLISION=emit.collision,
            PROBES=probes is not None,
            BLOCK_M=launch.block_m, BLOCK_N=launch.block_n,
            BLOCK_D=padded(d), BLOCK_DV=padded(dv), BLOCK_G=padded(n_g),
            PROBE_PRECISION="ieee" if torch.version.hip else "tf32x3",
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
    if emit.visible:
        rows["visible"] = keys_seen(problem).expand(b, h, -1).contiguous()
    return out, Emitted(**rows)


def padded(columns: int) -> int:
    """Columns of a tile: a power of two of at least 16, which the matrix units want."""
    return max(16, triton.next_power_of_2(columns))


def unsupported(problem: Problem, request: Request) -> str | None:
    """The first option or statistic that this kernel does not have, by its name in `attention`; None if it has all."""
    emit = request.emit
    interpreted = not isinstance(attention_forward_kernel, triton.JITFunction)
    options = {
        "window": problem.window is not None,
        "prefix": problem.prefix is not None,
        "segments": problem.query_segments is not None,
        "key_mask": problem.key_mask is not None,
        "mask": problem.mask is not None,
        "bias": problem.bias is not None,
        "alibi": problem.alibi is not None,
        "relative_bias": problem.relative_bias is not None,
        "softcap": problem.softcap is not None,
        "sinks": problem.sinks is not None,
        "normalizer='sigmoid'": problem.normalizer == "sigmoid",
        "a scale that is not positive": problem.scale <= 0,
        "float64": problem.q.dtype == torch.float64,
        "query_probes": request.query_probes is not None,
        "gather": request.gather is not None,
        "rows": request.rows is not None,
        "columns": request.columns is not None,
        "key_sum": emit.key_sum,
        "key_square": emit.key_square,
        "key_max": emit.key_max,
        "pool": bool(request.pools),
        "offsets": bool(request.edges),
        "top_k": emit.top_k is not None,
        "head_gram": emit.head_gram,
        "more than 128 key_probes": problem.key_probes is not None and problem.key_probes.shape[-1] > MAX_PROBES,
        "gradients": torch.is_grad_enabled() and any(t.requires_grad for t in problem.learned().values()),
        f"tensors on {problem.q.device.type}": not (problem.q.is_cuda or interpreted),
    }
    return next((name for name, asked in options.items() if asked), None)

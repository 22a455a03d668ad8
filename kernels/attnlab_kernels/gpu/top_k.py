"""The largest entries of each row with their keys, in one pass over the keys for every 64 of them.

A logit and its key are packed into one integer that orders as the answer does: the logit's bits, made to grow with it,
above the key counted down, so that of equal logits the first key is larger. All are different. A program keeps the
largest of a tile of queries in no order: while a row of the next tile of keys holds one that beats its smallest, the
largest of the tile takes that place. A tile whose largest logits beat nothing is not packed at all.
"""

# triton's own decorators and scalars carry no types
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnlab_kernels.gpu.arguments import kernel_inputs, padded
from attnlab_kernels.gpu.configs import Launch, top_k_launch
from attnlab_kernels.gpu.launch_forward import Rows
from attnlab_kernels.gpu.schedule import make_schedules
from attnlab_kernels.gpu.scores import head_of, load_columns, load_rows, logits, shares
from attnlab_kernels.gpu.tiles import key_tile, plan_keys
from attnlab_kernels.problem import Problem
from attnlab_kernels.request import Request

MAX_LIST = 64
"""Most entries that one pass finds: their list shares the registers with the tile."""

HIDDEN = tl.constexpr(-(2**63))
"""What a hidden entry is packed as; what fills an unused place is larger, and any visible entry larger still."""

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
"""What a visible entry's logit is at least."""


@triton.jit
def _pack(b_s, o_n):
    """A logit and its key as one integer. Zeros of either sign are equal."""
    bits = tl.where(b_s == 0.0, 0.0, b_s).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    packed = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - o_n).to(tl.int64)
    return tl.where(b_s == -float("inf"), HIDDEN, packed)


@triton.jit
def _unpack(packed):
    """Logit and key; -inf and -1 where there is no entry."""
    ordered = (packed >> 32).to(tl.int32)
    none = ordered == -2147483648
    b_s = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    key = 0x7FFFFFFF - (packed & 0x7FFFFFFF)
    return tl.where(none, -float("inf"), b_s), tl.where(none, -1, key)


@triton.jit
def _visit(
    found, last, floor, below, b_q, x, p_k, i_b, i_h, i_m, start,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys. `last` is the smallest of each row's list, `floor` its logit or the lowest there is."""
    o_m = (i_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    o_n = (start + tl.arange(0, BLOCK_N))[None, :]
    b_k = load_columns(p_k, x.k, start, x.keys, x.d, BLOCK_N, BLOCK_D, MASKED)
    b_s = tl.dot(b_q, b_k, input_precision="ieee")
    b_s = logits(b_s, x, i_b, i_h, o_m, o_n, MASKED)[0]
    # Tiles come in any order: one as large as the smallest of the list may have the smaller key. Rows are not reduced
    # apart here: triton 3.6 and 3.7 fail for Blackwell where what a product's rows gave is reduced again.
    if tl.max((b_s >= floor[:, None]).to(tl.int32)) != 0:
        packed = _pack(b_s, o_n)
        if below is not None:
            packed = tl.where(packed < below[:, None], packed, HIDDEN)
        best = tl.max(packed, 1)
        while tl.max((best > last).to(tl.int32), 0) != 0:
            here = (found == last[:, None]) & (best > last)[:, None]
            found = tl.where(here, best[:, None], found)
            packed = tl.where(packed == best[:, None], HIDDEN, packed)
            last = tl.min(found, 1)
            best = tl.max(packed, 1)
        floor = tl.maximum(_unpack(last)[0], LOWEST)
    return found, last, floor


@triton.jit
def top_k_kernel(
    x, schedule, rows, values, keys, bound, k, first, wanted,
    BOUNDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: one tile of queries of one head. Grid (B * Hq, tiles).

    Writes places `first` to `first + wanted` of `values` and `keys` [B, Hq, Nq, k]. `bound` [B, Hq, Nq] carries the
    last entry found from one pass to the next; `BOUNDED` says that there was a pass before.
    """
    i_bh = tl.program_id(0).to(tl.int64)
    i_b = i_bh // x.heads
    i_h = i_bh % x.heads
    i_m = tl.program_id(1)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = tl.arange(0, BLOCK_K)
    in_rows = o_m < x.queries
    o_row = i_bh * x.queries + o_m
    b_q = load_rows(head_of(x.q, i_b, i_h), x.q, i_m * BLOCK_M, x.queries, x.d, BLOCK_M, BLOCK_D, True)
    p_k = head_of(x.k, i_b, i_h // x.group)
    below = None
    if BOUNDED:
        below = tl.load(bound + o_row, mask=in_rows, other=HIDDEN)
    # Unused places differ, so that only one at a time is taken; those beyond `wanted` are too large to be.
    unused = tl.where(o_k < wanted, HIDDEN + 1 + o_k.to(tl.int64), 2**63 - 1)
    found = tl.zeros([BLOCK_M, BLOCK_K], tl.int64) + unused[None, :]
    last = tl.min(found, 1)
    floor = tl.full([BLOCK_M], LOWEST, tl.float32)
    full, every, h0, h1, w0, w1, w2 = plan_keys(x, schedule, i_b, i_h, i_m, BLOCK_M, BLOCK_N)
    for t in range(full):
        start = key_tile(t, schedule, i_b, i_h, i_m, full, h0, h1, w0, w1, w2, True) * BLOCK_N
        found, last, floor = _visit(
            found, last, floor, below, b_q, x, p_k, i_b, i_h, i_m, start, False, BLOCK_M, BLOCK_N, BLOCK_D
        )
    for t in range(full, every):
        start = key_tile(t, schedule, i_b, i_h, i_m, full, h0, h1, w0, w1, w2, False) * BLOCK_N
        found, last, floor = _visit(
            found, last, floor, below, b_q, x, p_k, i_b, i_h, i_m, start, True, BLOCK_M, BLOCK_N, BLOCK_D
        )
    if bound is not None:
        tl.store(bound + o_row, last, mask=in_rows)
    found = tl.sort(tl.where(o_k[None, :] < wanted, found, HIDDEN), descending=True)
    b_s, b_key = _unpack(found)
    pivot = tl.load(rows.pivot + o_row, mask=in_rows, other=0.0)
    log_z = tl.load(rows.log_z + o_row, mask=in_rows, other=0.0)
    b_p = shares(b_s, x, pivot[:, None], log_z[:, None])
    at = o_row[:, None] * k + first + o_k[None, :]
    here = in_rows[:, None] & (o_k[None, :] < wanted)
    tl.store(values + at, b_p, mask=here)
    tl.store(keys + at, b_key, mask=here)


def run_top_k(problem: Problem, request: Request, rows: Rows, launch: Launch | None = None) -> dict[str, Tensor]:
    """The k largest P of each row in falling order [B, Hq, Nq, k], and their keys; 0 and -1 past the last one."""
    b, h, n_q, n_k, d = *problem.q.shape[:3], problem.keys, problem.q.shape[-1]
    k, device = request.emit.top_k or 0, problem.q.device
    possible = min(k, n_k)
    values = torch.empty(b, h, n_q, k, dtype=torch.float32, device=device)
    keys = torch.empty(b, h, n_q, k, dtype=torch.int64, device=device)
    values[..., possible:] = 0
    keys[..., possible:] = -1
    if not (values.numel() and possible):
        return {"top_k_values": values, "top_k_keys": keys}
    longest = min(possible, MAX_LIST)
    if launch is None:
        launch = top_k_launch(d, problem.q.element_size(), longest)
    x = kernel_inputs(problem)
    schedule = make_schedules(problem, launch.block_m, launch.block_n).over_keys
    bound = torch.empty(b, h, n_q, dtype=torch.int64, device=device) if possible > longest else None
    for first in range(0, possible, longest):
        top_k_kernel[(b * h, triton.cdiv(n_q, launch.block_m))](
            x, schedule, rows, values, keys, bound, k, first, min(longest, possible - first),
            BOUNDED=first > 0, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_D=padded(d),
            BLOCK_K=triton.next_power_of_2(longest), **launch.options(),
        )  # fmt: skip
    return {"top_k_values": values, "top_k_keys": keys}

"""The sum of the pattern at every single distance i + offset - j, for profiles with many bins.

A program owns a diagonal of tiles. An entry's place in the tile has the same distance in all of them, so tiles are
added entry by entry, one addition a score, and only the sum of all tiles is cut along its diagonals.
"""

# triton's own decorators and scalars carry no types
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from attnlab_kernels.gpu.arguments import kernel_inputs, padded
from attnlab_kernels.gpu.configs import Launch
from attnlab_kernels.gpu.schedule import make_diagonal_schedule
from attnlab_kernels.gpu.scores import head_of, load_rows
from attnlab_kernels.gpu.statistics import Factors, exponentials, load_factor, load_queries, scores
from attnlab_kernels.problem import Problem


class Diagonals(NamedTuple):
    """Sums and counts at the distances of each diagonal of tiles, [B * Hq, diagonals, 2, block].

    The first half holds distances from those of a tile's own diagonal upwards, the second those below it, from
    -block on. Counts are int32, or None.
    """

    sums: Any
    counts: Any


@triton.jit
def _visit(
    acc, seen, x, factors, wanted, p_q, p_k, i_bh, i_b, i_h, i_m, i_n,
    MASKED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add one tile [keys, queries]."""
    o_m = i_m * BLOCK + tl.arange(0, BLOCK)
    o_n = i_n * BLOCK + tl.arange(0, BLOCK)
    b_k = load_rows(p_k, x.k, i_n * BLOCK, x.keys, x.d, BLOCK, BLOCK_D, MASKED)
    b_q = load_queries(p_q, x, i_b, i_m * BLOCK, BLOCK, BLOCK_D, MASKED)
    shift = load_factor(factors.shift, i_bh, i_m * BLOCK, x.queries, BLOCK, -float("inf"), MASKED)
    factor = load_factor(factors.factor, i_bh, i_m * BLOCK, x.queries, BLOCK, 0.0, MASKED)
    b_s = scores(b_k, b_q, x, i_b, i_h, o_m, o_n, MASKED)
    acc += exponentials(b_s, shift, x) * factor[None, :]
    if wanted.counts is not None:
        seen += ((b_s != -float("inf")) & (shift > -float("inf"))[None, :]).to(tl.int32)
    return acc, seen


@triton.jit
def _store_diagonals(p_sums, b_x, row, BLOCK: tl.constexpr):
    """Cut a tile [keys, queries] along its diagonals: each row turned by its number, so that they stand in columns."""
    o_c = tl.arange(0, BLOCK)
    places = tl.arange(0, BLOCK)[:, None] + o_c[None, :]
    b_turned = tl.gather(b_x, places % BLOCK, 1)
    tl.store(p_sums + row * 2 * BLOCK + o_c, tl.sum(tl.where(places < BLOCK, b_turned, 0), 0))
    tl.store(p_sums + (row * 2 + 1) * BLOCK + o_c, tl.sum(tl.where(places < BLOCK, 0, b_turned), 0))


@triton.jit
def diagonals_kernel(
    x, schedule, factors, wanted, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: one diagonal of tiles of one head. Grid (B * Hq, diagonals), the one at distance 0 in the middle.

    The schedule lists tiles of keys of each diagonal.
    """
    i_bh = tl.program_id(0).to(tl.int64)
    i_b = i_bh // x.heads
    i_h = i_bh % x.heads
    i_g = tl.program_id(1)
    shift = i_g - (tl.cdiv(x.keys, BLOCK) - 1)
    p_q = head_of(x.q, i_b, i_h)
    p_k = head_of(x.k, i_b, i_h // x.group)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    seen = tl.zeros([BLOCK, BLOCK], tl.int32)
    listed = (i_b * schedule.heads + i_h % schedule.heads).to(tl.int64) * schedule.rows + i_g
    full = tl.load(schedule.full + listed)
    every = tl.load(schedule.all + listed)
    tiles = schedule.tiles + listed * schedule.columns
    for t in range(full):
        i_n = tl.load(tiles + t)
        acc, seen = _visit(
            acc, seen, x, factors, wanted, p_q, p_k, i_bh, i_b, i_h, i_n + shift, i_n, False, BLOCK, BLOCK_D
        )
    for t in range(full, every):
        i_n = tl.load(tiles + t)
        acc, seen = _visit(
            acc, seen, x, factors, wanted, p_q, p_k, i_bh, i_b, i_h, i_n + shift, i_n, True, BLOCK, BLOCK_D
        )
    row = i_bh * tl.num_programs(1) + i_g
    _store_diagonals(wanted.sums, acc, row, BLOCK)
    if wanted.counts is not None:
        _store_diagonals(wanted.counts, seen, row, BLOCK)


def sums_at_distances(problem: Problem, factors: Factors, launch: Launch, count: bool) -> tuple[Tensor, Tensor | None]:
    """Sums [B, Hq, Nq + Nk - 1] at the distances from offset - (Nk - 1) on, and counts if they are asked for."""
    b, h, n_q, n_k, block = problem.batch, problem.heads, problem.queries, problem.keys, launch.block_m
    schedule = make_diagonal_schedule(problem, block)
    shape = (b * h, schedule.rows, 2, block)
    device = problem.q.device
    sums = torch.empty(shape, device=device)
    counts = torch.empty(shape, dtype=torch.int32, device=device) if count else None
    diagonals_kernel[(b * h, schedule.rows)](
        kernel_inputs(problem), schedule, factors, Diagonals(sums, counts),
        BLOCK=block, BLOCK_D=padded(problem.q.shape[-1]), **launch.options(),
    )  # fmt: skip
    first = block * triton.cdiv(n_k, block) - (n_k - 1)

    def joined(halves: Tensor) -> Tensor:
        # The lower half of a diagonal has the distances of the upper half of the one before.
        sums = pad(halves[:, :, 0], (0, 0, 1, 0)) + pad(halves[:, :, 1], (0, 0, 0, 1))
        return sums.flatten(1)[:, first : first + n_q + n_k - 1].unflatten(0, (b, h))

    return joined(sums), None if counts is None else joined(counts)

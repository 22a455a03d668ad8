"""Products of all pairs of heads, <A_h, A_g> = sum over queries that count of A_h * A_g, exact to float32.

Blocks of entries of all heads go through a buffer of bounded size: the rectangle kernel fills it, and a product of it
with itself is added to a fixed number of partial sums, each with what its rounding lost (Kahan, 1965). So the result
depends neither on the order in which programs run nor on how torch was told to multiply.
"""

# triton's own decorators and scalars carry no types
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnlab_kernels.gpu.arguments import kernel_inputs
from attnlab_kernels.gpu.configs import Launch, gram_launch
from attnlab_kernels.gpu.entries import Rectangle, launch_rectangle
from attnlab_kernels.gpu.launch_forward import Rows
from attnlab_kernels.problem import Problem
from attnlab_kernels.request import Request

BUFFER_BYTES = 64 * 2**20
"""Size of the buffer that entries go through."""

ALIGNMENT = 16
"""Sides of a block are multiples of this, so the product reads whole chunks; entries past the last one are 0."""


class Block(NamedTuple):
    """Queries from `first_query` on and keys from `first_key` on."""

    first_query: int
    first_key: int
    queries: int
    keys: int


@triton.jit
def gram_kernel(
    entries, total, lost, heads, length, parts,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add every `parts`-th chunk of `entries` [B, Hq, length] to `total` and `lost` [B, parts, Hq, Hq].

    Grid (B, parts, pairs of tiles of heads); pairs below the diagonal are left out.
    """
    i_b = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    tiles = tl.cdiv(heads, BLOCK_H)
    i_h = tl.program_id(2) // tiles
    i_g = tl.program_id(2) % tiles
    if i_h <= i_g:
        o_h = i_h * BLOCK_H + tl.arange(0, BLOCK_H)
        o_g = i_g * BLOCK_H + tl.arange(0, BLOCK_H)
        o_k = tl.arange(0, BLOCK_K)
        m_h = (o_h < heads)[:, None]
        m_g = (o_g < heads)[None, :]
        p_h = entries + (i_b * heads + o_h[:, None]) * length + o_k[None, :]
        p_g = entries + (i_b * heads + o_g[None, :]) * length + o_k[:, None]
        at = ((i_b * tl.num_programs(1) + part) * heads + o_h[:, None]) * heads + o_g[None, :]
        acc = tl.load(total + at, mask=m_h & m_g, other=0.0)
        rest = tl.load(lost + at, mask=m_h & m_g, other=0.0)
        for start in range(part * BLOCK_K, length, parts * BLOCK_K):
            b_h = tl.load(p_h + start, mask=m_h, other=0.0)
            b_g = tl.load(p_g + start, mask=m_g, other=0.0)
            added = tl.dot(b_h, b_g, input_precision=PRECISION) - rest
            new = acc + added
            rest = (new - acc) - added
            acc = new
        tl.store(total + at, acc, mask=m_h & m_g)
        tl.store(lost + at, rest, mask=m_h & m_g)


def run_head_gram(
    problem: Problem, request: Request, rows: Rows, launch: Launch | None = None, buffer_bytes: int = BUFFER_BYTES
) -> dict[str, Tensor]:
    """<A_h, A_g> for all pairs of heads, [B, Hq, Hq].

    Args:
        problem: what to compute.
        request: not read; every statistic is launched with the same arguments.
        rows: the rows' normalisers.
        launch: heads of a tile and entries of a chunk; the table's by default.
        buffer_bytes: size of the buffer that entries go through.
    """
    b, h, device = problem.batch, problem.heads, problem.q.device
    if launch is None:
        launch = gram_launch(h)
    blocks = list(_blocks(problem, buffer_bytes // (4 * max(1, b * h))))
    if not (b and h and blocks):
        return {"head_gram": torch.zeros(b, h, h, dtype=torch.float32, device=device)}
    longest = max(block.queries * block.keys for block in blocks)
    pairs = triton.cdiv(h, launch.block_m) ** 2
    parts = max(1, min(256 // (b * pairs), longest // launch.block_n))
    total, lost = torch.zeros(2, b, parts, h, h, dtype=torch.float32, device=device)
    buffer = torch.empty(b * h * longest, dtype=torch.float32, device=device)
    x = kernel_inputs(problem)
    for block in blocks:
        length = block.queries * block.keys
        entries = buffer[: b * h * length].view(b, h, block.queries, block.keys)
        launch_rectangle(x, rows, Rectangle(None, None, *block), entries, counted=True)
        gram_kernel[(b, parts, pairs)](
            entries, total, lost, h, length, parts,
            BLOCK_H=launch.block_m, BLOCK_K=launch.block_n, PRECISION="ieee" if torch.version.hip else "tf32x3",
            **launch.options(),
        )  # fmt: skip
    upper = (total.double() - lost).sum(1).triu()
    return {"head_gram": (upper + upper.triu(1).mT).float()}


def _blocks(problem: Problem, entries: int) -> Iterator[Block]:
    """Blocks of about `entries` entries of a head, which hold all that are visible."""
    widest = _up(problem.keys)
    if not (widest and problem.queries):
        return
    # Few rows waste little above the diagonal; more of them where all keys fit anyway.
    side = min(128, max(ALIGNMENT, _down(math.isqrt(entries))))
    height = min(max(side, _down(entries // widest)), _up(problem.queries))
    width = max(side, _down(entries // max(1, height)))
    for first in range(0, problem.queries, height):
        number = min(height, _up(problem.queries - first))
        for start, stop in _in_sight(problem, first, min(first + height, problem.queries) - 1):
            for key in range(_down(start), stop, width):
                yield Block(first, key, number, min(width, _up(stop - key)))


def _in_sight(problem: Problem, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Ranges of keys that hold all that queries `first` to `last` can see by their positions; they do not overlap."""
    start, stop, head = 0, problem.keys, 0
    if problem.prefix is None:
        low, high = first + problem.offset, last + problem.offset
        if problem.causal:
            stop = min(stop, high + 1)
        if problem.window is not None:
            head = _up(min(problem.first_tokens, stop))
            start = max(head, low - problem.window + 1)
            stop = min(stop, high + problem.window)
    if head > 0:
        yield 0, head
    if start < stop:
        yield start, stop


def _up(number: int) -> int:
    return -(-number // ALIGNMENT) * ALIGNMENT


def _down(number: int) -> int:
    return number // ALIGNMENT * ALIGNMENT

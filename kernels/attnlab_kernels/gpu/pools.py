"""Sums over blocks of queries and keys, for pooled maps: the kernel's part, and what is left to add afterwards.

A tile is cut into parts: whole tiles where a block is made of them, blocks where a tile is. For any other block size
parts are the largest power of two that is not longer than a block, and one that reaches across a block's boundary is
summed in two pieces. Every sum is written once, into memory that begins as 0, so that tiles nobody visits read 0.
"""

# triton's own decorators and scalars carry no types
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnlab_kernels.gpu.configs import Launch


class Pool(NamedTuple):
    """Sums over parts, [B * Hq, rows * pieces, columns * pieces] in float32, and the number of visible entries.

    Attributes:
        sums, counts: where they go.
        size: queries and keys of a block.
        rows, columns: parts either way.
        part_m, part_n: queries and keys of a part; constexpr.
        split: constexpr; parts have two pieces, before and after the boundary of a block.
    """

    sums: Any
    counts: Any
    size: Any
    rows: Any
    columns: Any
    part_m: Any
    part_n: Any
    split: Any


@triton.jit
def _over_queries(b_x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr):
    """[ROWS, COLUMNS] summed over parts of the columns."""
    return tl.sum(tl.reshape(b_x, [ROWS, COLUMNS // PART, PART]), 2)


@triton.jit
def _places(pool, i_bh, i_m, i_n, piece: tl.constexpr, PARTS_M: tl.constexpr, PARTS_N: tl.constexpr):
    """Where [parts of keys, parts of queries] of a tile stand in a map, and which of them exist."""
    PIECES: tl.constexpr = 2 if pool.split else 1
    o_r = tl.arange(0, PARTS_M)[None, :]
    o_c = tl.arange(0, PARTS_N)[:, None]
    columns = pool.columns * PIECES
    first = ((i_bh * pool.rows + i_m * PARTS_M) * PIECES + piece) * columns + i_n * (PARTS_N * PIECES)
    inside = (o_r < pool.rows - i_m * PARTS_M) & (o_c < pool.columns - i_n * PARTS_N)
    return first, o_r * (PIECES * columns) + o_c * PIECES, inside


@triton.jit
def _store_over_keys(
    p_map, b_parts, pool, i_bh, i_m, i_n, keys_later, piece: tl.constexpr, PARTS_M: tl.constexpr, PARTS_N: tl.constexpr
):
    """Sum [keys, parts of queries] over parts of the keys and write them, each piece at its place."""
    first, o, inside = _places(pool, i_bh, i_m, i_n, piece, PARTS_M, PARTS_N)
    at = p_map + first + o
    if pool.split:
        b_later = tl.where(keys_later[:, None], b_parts, 0.0)
        tl.store(at + 1, tl.sum(tl.reshape(b_later, [PARTS_N, pool.part_n, PARTS_M]), 1), mask=inside)
        b_parts = tl.where(keys_later[:, None], 0.0, b_parts)
    tl.store(at, tl.sum(tl.reshape(b_parts, [PARTS_N, pool.part_n, PARTS_M]), 1), mask=inside)


@triton.jit
def add_to_pool(
    b_e, factor, pool, i_bh, i_m, i_n, keys_later, piece: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Write one piece of a tile's sums of `b_e * factor` [keys, queries]; returns the sums over queries."""
    PARTS_M: tl.constexpr = BLOCK_M // pool.part_m
    PARTS_N: tl.constexpr = BLOCK_N // pool.part_n
    b_parts = _over_queries(b_e * factor[None, :], BLOCK_N, BLOCK_M, pool.part_m)
    _store_over_keys(pool.sums, b_parts, pool, i_bh, i_m, i_n, keys_later, piece, PARTS_M, PARTS_N)
    return tl.sum(b_parts, 1)


@triton.jit
def count_in_pool(
    b_seen, factor, pool, x, i_bh, i_m, i_n, keys_later,
    piece: tl.constexpr, GUARDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write one piece of a tile's numbers of visible entries; those of factor 0 do not count."""
    PARTS_M: tl.constexpr = BLOCK_M // pool.part_m
    PARTS_N: tl.constexpr = BLOCK_N // pool.part_n
    SOME: tl.constexpr = x.query_mask is not None or pool.split
    if GUARDED:
        if SOME:
            b_seen = b_seen & (factor > 0)[None, :]
        b_counts = _over_queries(b_seen.to(tl.float32), BLOCK_N, BLOCK_M, pool.part_m)
        _store_over_keys(pool.counts, b_counts, pool, i_bh, i_m, i_n, keys_later, piece, PARTS_M, PARTS_N)
    elif SOME:
        b_counts = _over_queries((factor > 0)[None, :].to(tl.float32), 1, BLOCK_M, pool.part_m)
        b_counts = tl.broadcast_to(b_counts, [BLOCK_N, PARTS_M])
        _store_over_keys(pool.counts, b_counts, pool, i_bh, i_m, i_n, keys_later, piece, PARTS_M, PARTS_N)
    else:
        first, o, inside = _places(pool, i_bh, i_m, i_n, piece, PARTS_M, PARTS_N)
        whole = tl.full([PARTS_N, PARTS_M], pool.part_m * pool.part_n, tl.float32)
        tl.store(pool.counts + first + o, whole, mask=inside)


def make_pool(size: int, b: int, h: int, n_q: int, n_k: int, launch: Launch, device: torch.device) -> Pool:
    """Parts of a map for the tiles of a launch, and memory for their sums."""
    split = not all(block % size == 0 or size % block == 0 for block in (launch.block_m, launch.block_n))
    part_m, part_n = (
        block if size % block == 0 else min(block, 1 << (size.bit_length() - 1))
        for block in (launch.block_m, launch.block_n)
    )
    rows, columns, pieces = triton.cdiv(n_q, part_m), triton.cdiv(n_k, part_n), 1 + split
    sums, counts = (torch.zeros(b * h, rows * pieces, columns * pieces, device=device) for _ in range(2))
    return Pool(sums, counts, size, rows, columns, tl.constexpr(part_m), tl.constexpr(part_n), tl.constexpr(split))


def pieces_later(pool: Pool, positions: Tensor) -> Tensor:
    """Which queries stand in the second piece of their part."""
    part = pool.part_m.value
    return positions // pool.size > positions // part * part // pool.size


def means(pool: Pool, b: int, h: int, n_q: int, n_k: int) -> tuple[Tensor, Tensor]:
    """The map [B, Hq, blocks of queries, blocks of keys] and its counts, from the sums over parts."""
    pieces = 1 + pool.split.value

    def whole(parts: Tensor) -> Tensor:
        parts = _gather_blocks(parts, 1, n_q, pool.part_m.value, pool.size, pieces)
        return _gather_blocks(parts, 2, n_k, pool.part_n.value, pool.size, pieces).float().unflatten(0, (b, h))

    counts = whole(pool.counts)
    return whole(pool.sums) / counts.clamp(min=1), counts


def _gather_blocks(parts: Tensor, dim: int, length: int, part: int, size: int, pieces: int) -> Tensor:
    """Sum the pieces of each block along a dimension, in order."""
    if part == size:
        return parts
    blocks, pieces_there, device = -(-length // size), parts.shape[dim], parts.device

    def bounds(device: torch.device | str) -> tuple[Tensor, Tensor]:
        o = torch.arange(pieces_there, device=device)
        block_of = (o // pieces * part + o % pieces * (part - 1)) // size
        first, stop = (torch.searchsorted(block_of, torch.arange(blocks, device=device) + more) for more in (0, 1))
        return first, stop

    # How many there are at most is found on the CPU as well: a look at the device, or a copy to it, would wait for it.
    most = torch.stack(bounds("cpu")).diff(dim=0).max() if blocks else 0
    first, stop = bounds(device)
    place = first[:, None] + torch.arange(int(most), device=device)
    inside = place < stop[:, None]
    taken = parts.index_select(dim, place.clamp(max=pieces_there - 1).flatten()).unflatten(dim, place.shape)
    inside = inside.view(*inside.shape, *(1,) * (parts.dim() - 1 - dim))
    return torch.where(inside, taken, 0).sum(dim + 1, dtype=torch.float64)

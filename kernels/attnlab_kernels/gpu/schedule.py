"""Lists of the tiles to visit, where positions alone do not say: prefixes, packed documents, padding, boolean masks.

Each tile is empty, mixed or full (as in FlexAttention's block masks, arXiv 2412.05496). Documents are compared by the
smallest and largest number in a tile, so tiles that hold none in common are skipped where numbers do not interleave.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnlab_kernels.problem import Problem


class Schedule(NamedTuple):
    """For each row of tiles [b, heads, rows] the tiles of its list [b, heads, rows, columns], the full ones first.

    Attributes:
        tiles: int32 numbers of tiles. full, all: int32, how many of them hide nothing, and how many are visited.
        heads: 1 where all heads share the lists, else their number. rows, columns: tiles either way.
    """

    tiles: Any
    full: Any
    all: Any
    heads: Any
    rows: Any
    columns: Any


class Schedules(NamedTuple):
    """The lists over keys for each tile of queries, and over queries for each tile of keys."""

    over_keys: Schedule | None
    over_queries: Schedule | None


def make_schedules(problem: Problem, block_m: int, block_n: int) -> Schedules:
    """Both lists for tiles of `block_m` queries and `block_n` keys; None where arithmetic does."""
    listed = (problem.prefix, problem.query_segments, problem.key_mask, problem.mask)
    if all(option is None for option in listed) or not (problem.queries and problem.keys):
        return Schedules(None, None)
    some, every = _tiles_seen(problem, block_m, block_n)
    # A tile that reaches beyond the last key, or in sums over queries beyond the last query, is not full.
    every = every.clone()
    every[:, :, :, problem.keys // block_n :] = False
    whole = every.clone()
    whole[:, :, problem.queries // block_m :] = False
    return Schedules(_listed(some, every), _listed(some.mT, whole.mT))


def _listed(some: Tensor, every: Tensor) -> Schedule:
    order = torch.where(every, 0, torch.where(some, 1, 2)).to(torch.int8)
    tiles = order.sort(dim=-1, stable=True).indices.int().contiguous()
    full, visited = every.sum(-1, dtype=torch.int32), some.sum(-1, dtype=torch.int32)
    return Schedule(tiles, full.contiguous(), visited.contiguous(), tiles.shape[1], tiles.shape[2], tiles.shape[3])


def _tiles_seen(problem: Problem, block_m: int, block_n: int) -> tuple[Tensor, Tensor]:
    """[b, h or 1, tiles, tiles] twice: whether some entry of a tile may be visible, and whether all of them are."""
    device = problem.q.device
    first = torch.arange(0, problem.queries, block_m, device=device)
    last = (first + block_m).clamp(max=problem.queries) - 1 + problem.offset
    first = first + problem.offset
    near = torch.arange(0, problem.keys, block_n, device=device)
    far = (near + block_n).clamp(max=problem.keys) - 1
    # distances within a tile run from `low` to `high`
    low, high = first[:, None] - far, last[:, None] - near
    some = torch.ones_like(low, dtype=torch.bool)
    every = some
    if problem.window is not None:
        some = (low < problem.window) & (high > -problem.window)
        every = (high < problem.window) & (low > -problem.window)
        some = some | (near < problem.first_tokens)
        every = every | (far < problem.first_tokens)
    if problem.causal:
        some, every = some & (high >= 0), every & (low >= 0)
    some, every = some[None, None], every[None, None]
    if problem.prefix is not None:
        prefix = problem.prefix[:, None, None, None]
        some, every = some | (near < prefix), every | (far < prefix)
    if problem.query_segments is not None and problem.key_segments is not None:
        (q_low, q_high), (k_low, k_high) = (
            _extremes(problem.query_segments, block_m),
            _extremes(problem.key_segments, block_n),
        )
        q_low, q_high, k_low, k_high = q_low[:, :, None], q_high[:, :, None], k_low[:, None], k_high[:, None]
        some = some & ((q_low <= k_high) & (k_low <= q_high))[:, None]
        every = every & ((q_low == q_high) & (k_low == k_high) & (q_low == k_low))[:, None]
    if problem.key_mask is not None:
        exists = problem.key_mask.int()
        some = some & _blocks(exists, block_n, 0).amax(-1).bool()[:, None, None]
        every = every & _blocks(exists, block_n, 1).amin(-1).bool()[:, None, None]
    if problem.mask is not None:
        seen = problem.mask.expand(-1, -1, problem.queries, problem.keys)
        some = some & _tile_extreme(seen, block_m, block_n, False)
        every = every & _tile_extreme(seen, block_m, block_n, True)
    shape = (problem.batch, max(some.shape[1], every.shape[1]), len(first), len(near))
    return some.expand(shape), (every & some).expand(shape)


def _blocks(rows: Tensor, size: int, value: int) -> Tensor:
    """[..., n] cut into [..., blocks, size], the last one filled up."""
    length = rows.shape[-1]
    return pad(rows, (0, -length % size), value=value).unflatten(-1, (-1, size))


def _extremes(ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    length = ids.shape[-1]
    # Filled up with the last number, which is in the last block already.
    blocks = torch.cat([ids, ids[:, -1:].expand(-1, -length % size)], -1).unflatten(-1, (-1, size))
    return blocks.amin(-1), blocks.amax(-1)


def _tile_extreme(seen: Tensor, block_m: int, block_n: int, all_of: bool) -> Tensor:
    """Whether any, or all, entries of each tile are True; one band of queries at a time."""
    bands = []
    for start in range(0, seen.shape[2], block_m):
        band = seen[:, :, start : start + block_m]
        column = (band.all(2) if all_of else band.any(2)).to(torch.uint8)
        blocks = _blocks(column, block_n, int(all_of))
        bands.append((blocks.amin(-1) if all_of else blocks.amax(-1)).bool())
    return torch.stack(bands, 2)


def make_diagonal_schedule(problem: Problem, block: int) -> Schedule:
    """Lists of tiles of keys for each diagonal of square tiles, from the last tile of keys and the first queries on."""
    some, every = _tiles_seen(problem, block, block)
    every = every.clone()
    every[:, :, problem.queries // block :] = False
    every[:, :, :, problem.keys // block :] = False
    rows, columns = some.shape[2:]
    tile_n = torch.arange(columns, device=some.device)
    tile_m = torch.arange(1 - columns, rows, device=some.device)[:, None] + tile_n
    inside = (tile_m >= 0) & (tile_m < rows)
    tile_m = tile_m.clamp(0, rows - 1)
    return _listed(some[:, :, tile_m, tile_n] & inside, every[:, :, tile_m, tile_n] & inside)

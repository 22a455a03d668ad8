"""Cuts a problem into tiles for the `tiled` backend: whole rows of scores, as many as fit the cache.

A tile takes all keys that its queries can see, so each row's normaliser is known at once and statistics over queries
need no second pass over Q K^T. Several heads, and several batch rows where sequences are short, share a tile. A strip
is all tiles of some heads of some batch rows: no two strips write to the same place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from attnlab_kernels.problem import Problem
from attnlab_kernels.reach import Reach, key_reach

CACHE_SCORES = 1 << 20
"""Scores in one tile whose weights are kept: 4 MB of float32, which stay near a core's caches."""

SPENT_TIMES, SPENT_ROWS = 4, 1024
"""Of a tile whose weights are not kept, of which a few rows exist at a time: so many times larger."""

ENOUGH_STRIPS = 6
"""Heads and batch rows share a tile, which spares small operations, as long as so many strips are left for the cores.

Not a multiple of the cores: results are to be the same to the last bit on any number of them. They are while
there are fewer than two cores for a strip; with more, torch parts a tile's products and sums in other orders.
"""

WORTH_A_STRIP = 1 << 17
"""Scores below which a strip of its own costs more than it spares."""

MIN_ROWS, MAX_ROWS = 16, 256
"""Rows of a tile for one head. Few starve the matrix product, many read hidden entries along the causal edge."""

WORTH_A_CUT = 32
"""Rows from which on a document has tiles of its own, and keys from which on a gap between seen keys is left out."""


class Tile(NamedTuple):
    """Where a tile lies: batch rows, key heads, queries and the keys that these can see."""

    b: slice
    n: slice
    i: slice
    j: slice


def plan_strips(
    problem: Problem,
    all_heads: bool = False,
    scores: int = CACHE_SCORES,
    gaps: bool = False,
    most_rows: int = MAX_ROWS,
) -> list[list[Tile]]:
    """Strips of tiles in a fixed order that cover every row once, rows that see no key included.

    Args:
        problem: the whole problem.
        scores: how many entries a tile may hold.
        all_heads: keep all heads of a batch row in one tile, for statistics of pairs of heads.
        gaps: whether the tiles will be parted by `without_gap`, so that keys in the gap take no room.
        most_rows: of a head in a tile; fewer where rows differ in their keys, or something of a tile's size is kept.
    """
    if not (problem.batch and problem.heads and problem.queries):
        return []
    widest = max(1, min(problem.keys, _widest(problem, gaps)))
    a_row = widest * problem.group
    if any(x is not None for x in _unlike_rows(problem)):
        most_rows = min(most_rows, MAX_ROWS)
    heads = problem.key_heads
    strips_wanted = problem.batch * problem.heads * problem.queries * problem.keys // WORTH_A_STRIP
    shared = max(1, problem.batch * heads // max(1, min(strips_wanted, ENOUGH_STRIPS)))
    if not all_heads:
        heads = max(1, min(heads, shared, scores // (a_row * min(problem.queries, most_rows))))
    batches = 1
    if heads == problem.key_heads:
        batches = max(1, min(problem.batch, shared // heads, scores // (a_row * heads * problem.queries)))
    reach = key_reach(problem)
    strips = []
    for b in _spans(problem.batch, batches):
        by_rows: dict[int, list[tuple[slice, slice]]] = {}
        for n in _spans(problem.key_heads, heads):
            rows = (b.stop - b.start) * (n.stop - n.start) * problem.group
            if rows not in by_rows:
                by_rows[rows] = list(_down(problem, b, scores // rows, reach, gaps, most_rows))
            strips.append([Tile(b, n, i, j) for i, j in by_rows[rows]])
    return strips


def _unlike_rows(problem: Problem) -> tuple[object, ...]:
    return problem.window, problem.mask, problem.query_segments, problem.alibi, problem.relative_bias


def _down(
    problem: Problem, b: slice, scores: int, reach: Reach, gaps: bool, most_rows: int
) -> Iterator[tuple[slice, slice]]:
    """Queries and keys of each tile of a strip, with so many scores for each head and batch row."""
    start = 0
    while start < problem.queries:
        stop = reach.aligned(b, start, min(problem.queries, start + most_rows), WORTH_A_CUT)
        keys = _keys_seen(problem, b, slice(start, stop), reach)
        width = _length(keys)
        if gaps:
            whole = Tile(b, slice(0, 0), slice(start, stop), keys)
            width = sum(_length(part.j) for part in without_gap(problem, whole))
        fitting = scores // max(1, width)
        i = slice(start, min(stop, start + max(MIN_ROWS, fitting // MIN_ROWS * MIN_ROWS)))
        yield i, keys if i.stop == stop else _keys_seen(problem, b, i, reach)
        start = i.stop


def without_gap(problem: Problem, tile: Tile) -> list[Tile]:
    """The tile, in two where its queries see the first keys and their window's and a good many between are hidden."""
    first = _first_keys(problem, tile.b, tile.i)
    if problem.window is None or first <= tile.j.start:
        return [tile]
    left = tile.i.start + problem.offset - problem.window + 1
    if left - first < WORTH_A_CUT or left >= tile.j.stop:
        return [tile]
    return [tile._replace(j=slice(tile.j.start, first)), tile._replace(j=slice(left, tile.j.stop))]


def _first_keys(problem: Problem, b: slice, i: slice) -> int:
    """Up to which key the queries see keys outside of their window."""
    first = problem.first_tokens
    if problem.causal:
        first = min(first, i.stop + problem.offset)
    if problem.prefix is not None:
        first = max(first, int(problem.prefix[b].max()))
    return min(first, problem.keys)


def _length(span: slice) -> int:
    return int(span.stop - span.start)


def _spans(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _widest(problem: Problem, gaps: bool) -> int:
    if problem.window is None:
        return problem.keys
    first = _first_keys(problem, slice(0, problem.batch), slice(0, problem.queries))
    if first > 0 and not gaps:
        return problem.keys
    return problem.window * (1 if problem.causal else 2) + MAX_ROWS + max(0, first)


def _keys_seen(problem: Problem, b: slice, i: slice, reach: Reach) -> slice:
    """The range of keys outside which the queries of a tile see nothing."""
    start, stop = 0, problem.keys
    if problem.causal:
        stop = min(stop, i.stop + problem.offset)
    if problem.window is not None:
        stop = min(stop, i.stop - 1 + problem.offset + problem.window)
        start = i.start + problem.offset - problem.window + 1
        if problem.first_tokens:
            start = 0
            if not problem.causal:
                stop = max(stop, min(problem.first_tokens, problem.keys))
    if problem.prefix is not None:
        start, stop = 0, max(stop, min(problem.keys, int(problem.prefix[b].max())))
    first, last = reach.of(b, i)
    start, stop = max(start, first), min(stop, last)
    start = max(0, min(start, problem.keys))
    return slice(start, max(start, stop))

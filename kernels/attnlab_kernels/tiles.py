"""Cuts a problem into tiles for the `tiled` backend: whole rows of scores, as many as fit the cache.

A tile takes all keys that its queries can see, so each row's normaliser is known at once and statistics over queries
need no second pass over Q K^T. Several heads, and several batch rows where sequences are short, share a tile. A strip
is all tiles of some heads of some batch rows: no two strips write to the same place.
"""

from __future__ import annotations

from typing import NamedTuple

from attnlab_kernels.problem import Problem

CACHE_SCORES = 1 << 20
"""Scores in one tile. A processor core has two such buffers, 8 MB of float32, which stay near its caches."""

SHARED_PART = 4
"""Heads and batch rows share a tile up to this part of its size, so that enough strips are left for every core."""

MIN_ROWS, MAX_ROWS = 16, 256
"""Rows of a tile for one head. Few starve the matrix product, many read hidden entries along the causal edge."""


class Tile(NamedTuple):
    """Where a tile lies: batch rows, key heads, queries and the keys that these can see."""

    b: slice
    n: slice
    i: slice
    j: slice


def plan_strips(problem: Problem, all_heads: bool = False, scores: int = CACHE_SCORES) -> list[list[Tile]]:
    """Strips of tiles in a fixed order that cover every row once, rows that see no key included.

    Args:
        problem: the whole problem.
        scores: how many entries a tile may hold.
        all_heads: keep all heads of a batch row in one tile, for statistics of pairs of heads.
    """
    if not (problem.batch and problem.heads and problem.queries):
        return []
    widest = max(1, min(problem.keys, _widest(problem)))
    a_row = widest * problem.group
    heads = problem.key_heads
    if not all_heads:
        heads = max(1, min(heads, scores // SHARED_PART // (a_row * min(problem.queries, MAX_ROWS))))
    batches = 1
    if heads == problem.key_heads:
        batches = max(1, min(problem.batch, scores // SHARED_PART // (a_row * heads * problem.queries)))
    existing = _existing_keys(problem)
    strips = []
    for b in _spans(problem.batch, batches):
        for n in _spans(problem.key_heads, heads):
            rows_of_one = (b.stop - b.start) * (n.stop - n.start) * problem.group
            tiles, start = [], 0
            while start < problem.queries:
                stop = min(problem.queries, start + MAX_ROWS)
                keys = _keys_seen(problem, b, slice(start, stop), existing)
                fitting = scores // max(1, rows_of_one * (keys.stop - keys.start))
                i = slice(start, min(stop, start + max(MIN_ROWS, fitting // MIN_ROWS * MIN_ROWS)))
                tiles.append(Tile(b, n, i, _keys_seen(problem, b, i, existing)))
                start = i.stop
            strips.append(tiles)
    return strips


def _spans(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _widest(problem: Problem) -> int:
    if problem.window is None or problem.first_tokens or problem.prefix is not None:
        return problem.keys
    return problem.window * (1 if problem.causal else 2) + MAX_ROWS


def _existing_keys(problem: Problem) -> list[tuple[int, int]]:
    """For each batch row the range of keys outside which `key_mask` has none, so that padding costs nothing."""
    if problem.key_mask is None or not problem.keys:
        return [(0, problem.keys)] * problem.batch
    exists = problem.key_mask.int()
    first = exists.argmax(1).tolist()
    last = exists.flip(1).argmax(1).tolist()
    some = exists.any(1).tolist()
    return [(f, problem.keys - e) if s else (0, 0) for f, e, s in zip(first, last, some, strict=True)]


def _keys_seen(problem: Problem, b: slice, i: slice, existing: list[tuple[int, int]]) -> slice:
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
    start = max(start, min(first for first, _ in existing[b]))
    stop = min(stop, max(last for _, last in existing[b]))
    start = max(0, min(start, problem.keys))
    return slice(start, max(start, stop))

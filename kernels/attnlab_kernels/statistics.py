"""Collects the statistics of a tile's rows into whole tensors (backend `tiled`).

What each row yields is written at its place; what sums over queries is added tile by tile, in the plan's fixed order,
so two runs give the same bytes.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from attnlab_kernels.counts import counted, has_closed_form, keys_seen, queries_seeing, visible_number
from attnlab_kernels.emit import Emitted
from attnlab_kernels.inner_loop import NEAR_SCORES, steps
from attnlab_kernels.problem import Problem, cut_broadcast
from attnlab_kernels.request import Request
from attnlab_kernels.rows import Asked, OverQueries, Rows, softmax_parts, spans, spend_parts
from attnlab_kernels.tiles import Tile
from attnlab_kernels.workspace import Workspace


class Collector:
    """All outputs of one call, filled tile by tile."""

    def __init__(self, problem: Problem, request: Request) -> None:
        self.problem, self.request = problem, request
        emit = request.emit
        b, h, n_q, n_k = problem.batch, problem.heads, problem.queries, problem.keys
        self.found: dict[str, Tensor] = {}
        self.count_entries = not has_closed_form(problem)
        rows = ("lse", "entropy", "max_probability", "collision", "visible")
        for name in rows:
            if getattr(emit, name):
                self._zeros(name, b, h, n_q)
        if emit.argmax:
            self.found["argmax"] = torch.full((b, h, n_q), -1, device=problem.q.device)
        if problem.sinks is not None:
            self._zeros("learned_sink_mass", b, h, n_q)
        if problem.key_probes is not None:
            self._zeros("key_probes", b, h, n_q, problem.key_probes.shape[-1])
        if request.query_probes is not None:
            self._zeros("query_probes", b, h, n_k, request.query_probes.shape[-1])
        if request.gather is not None:
            self._zeros("gathered", b, h, n_q, request.gather.shape[-1])
        if request.rows is not None:
            self._zeros("rows", b, h, request.rows.shape[-1], n_k)
        if request.columns is not None:
            self._zeros("columns", b, h, n_q, request.columns.shape[-1])
        for name in ("key_sum", "key_square", "key_max"):
            if getattr(emit, name):
                self._zeros(name, b, h, n_k)
        if request.key_statistics:
            self._zeros("key_count", b, h, n_k)
        if emit.top_k is not None:
            self._zeros("top_k_values", b, h, n_q, emit.top_k)
            self.found["top_k_keys"] = torch.full((b, h, n_q, emit.top_k), -1, device=problem.q.device)
        if emit.head_gram:
            self._zeros("head_gram", b, h, h)
        for number, size in enumerate(request.pools):
            shape = (b, h, -(-n_q // size), -(-n_k // size))
            self._zeros(f"pooled {number}", *shape)
            self._zeros(f"pooled_count {number}", *shape)
        if request.edges:
            self._zeros("by_distance", b, h, n_q + n_k)
            self._zeros("distance_count", b, h, n_q + n_k)
        self.out = torch.zeros(b, h, n_q, problem.v.shape[-1], dtype=problem.q.dtype, device=problem.q.device)

    def _zeros(self, name: str, *shape: int) -> None:
        self.found[name] = torch.zeros(shape, dtype=self.problem.dtype, device=self.problem.q.device)

    @property
    def keeps(self) -> bool:
        """Whether anything is read off the entries that needs all of a tile's at a time."""
        emit, request = self.request.emit, self.request
        wanted = (request.query_probes, request.gather, request.rows, request.columns, emit.top_k)
        probes = self.problem.key_probes is not None
        return probes or emit.head_gram or any(x is not None for x in wanted) or bool(request.pools or request.edges)

    def add(self, tiles: list[Tile], blocks: list[Problem], work: Workspace) -> None:
        """Compute a tile and read everything asked for off it.

        Args:
            tiles: the tile, or its parts where keys between are left out; they differ in their keys alone.
            blocks: the problem, cut to each of them.
            work: the core's buffers.
        """
        tile, emit = tiles[0], self.request.emit
        h = slice(tile.n.start * blocks[0].group, tile.n.stop * blocks[0].group)
        asked = Asked(emit.entropy, emit.argmax, emit.collision)
        if self.keeps:
            # The shares are overwritten last.
            p, rows = softmax_parts(blocks, work, asked, self.out[tile.b, h, tile.i])
            self._write_rows((tile.b, h, tile.i), tiles, rows)
            self._read_entries((tile.b, h, tile.i), tiles, blocks, rows, p)
            self._write_entries(tiles, h, rows, p)
            for at, part, block in zip(spans(blocks), tiles, blocks, strict=True):
                self._add_over_queries(part, h, block, rows, p[..., at], work)
        else:
            over = self._sums_of_tile(blocks)
            rows = spend_parts(blocks, work, asked, self.out[tile.b, h, tile.i], over)
            self._write_rows((tile.b, h, tile.i), tiles, rows)
            for at, part, block in zip(spans(blocks), tiles, blocks, strict=True):
                self._add_sums((part.b, h, part.j), at, over)
                if self.request.key_statistics and self.count_entries:
                    self._count_readers(part, h, counted(block))
        if emit.visible and self.count_entries:
            self.found["visible"][tile.b, h, tile.i] = visible_number(blocks).squeeze(-1)

    def _sums_of_tile(self, blocks: list[Problem]) -> OverQueries:
        emit, block = self.request.emit, blocks[0]
        shape = (block.batch, block.heads, sum(one.keys for one in blocks))
        wanted = (emit.key_sum, emit.key_square, emit.key_max)
        return OverQueries(*(self.out.new_empty(shape, dtype=block.dtype) if one else None for one in wanted))

    def _add_sums(self, keys: tuple[slice, slice, slice], at: slice, over: OverQueries) -> None:
        for name in ("key_sum", "key_square"):
            sums = getattr(over, name)
            if sums is not None:
                self.found[name][keys] += sums[..., at]
        if over.key_max is not None:
            largest = self.found["key_max"][keys]
            torch.maximum(largest, over.key_max[..., at], out=largest)

    def _write_rows(self, row: tuple[slice, slice, slice], tiles: list[Tile], rows: Rows) -> None:
        emit, found, sinks = self.request.emit, self.found, self.problem.sinks
        if emit.lse:
            found["lse"][row] = rows.lse
        if rows.entropy is not None:
            found["entropy"][row] = rows.entropy
        if emit.max_probability:
            found["max_probability"][row] = rows.max_share
        if rows.argmax is not None:
            found["argmax"][row] = torch.where(rows.argmax < 0, -1, _to_keys(rows.argmax, tiles))
        if rows.collision is not None:
            found["collision"][row] = rows.collision
        if sinks is not None:
            sinks = sinks[row[1]].to(self.problem.dtype)[:, None]
            found["learned_sink_mass"][row] = torch.where(sinks == -math.inf, 0, torch.exp(sinks - rows.lse))

    def _read_entries(
        self, row: tuple[slice, slice, slice], tiles: list[Tile], blocks: list[Problem], rows: Rows, p: Tensor
    ) -> None:
        emit, found, n_k = self.request.emit, self.found, p.shape[-1]
        probes: Tensor | None = None
        for at, part in zip(spans(blocks), blocks, strict=True):
            if part.key_probes is not None:
                read = p[..., at] @ part.key_probes.expand(part.batch, part.heads, -1, -1)
                probes = read if probes is None else probes.add_(read)
        if probes is not None:
            found["key_probes"][row] = probes.mul_(rows.to_weights)
        if emit.top_k is not None and n_k:
            k = min(emit.top_k, n_k)
            values, keys = _top(p, k)
            absent = torch.arange(k, device=p.device) >= visible_number(blocks)
            if bool((values == 0).logical_and_(~absent).any()):
                # Weights that underflow look like hidden entries, which must not be listed in their place.
                keys = _top(torch.cat([_visible_logits(part) for part in blocks], -1), k).keys
                values = p.gather(-1, keys)
            found["top_k_values"][row][..., :k] = (values * rows.to_shares).masked_fill_(absent, 0)
            found["top_k_keys"][row][..., :k] = _to_keys(keys, tiles).masked_fill_(absent, -1)

    def _write_entries(self, tiles: list[Tile], h: slice, rows: Rows, p: Tensor) -> None:
        request, tile = self.request, tiles[0]
        for name, index in (("gathered", request.gather), ("columns", request.columns)):
            if index is None or not p.shape[-1]:
                continue
            wanted = index[tile.b, None, tile.i] if name == "gathered" else index[tile.b, None, None]
            inside, at = _from_keys(wanted.expand(-1, p.shape[1], p.shape[2], -1), tiles)
            taken = p.gather(-1, at).mul_(rows.to_weights)
            self.found[name][tile.b, h, tile.i] = torch.where(inside, taken, 0)
        if request.rows is not None:
            index = request.rows[tile.b]
            batch, place = ((index >= tile.i.start) & (index < tile.i.stop)).nonzero(as_tuple=True)
            if len(batch):
                at = index[batch, place] - tile.i.start
                taken = p[batch, :, at] * rows.to_weights[batch, :, at]
                start = 0
                for part in tiles:
                    stop = start + part.j.stop - part.j.start
                    self.found["rows"][tile.b, h][batch, :, place, part.j] = taken[..., start:stop]
                    start = stop

    def _add_over_queries(self, tile: Tile, h: slice, block: Problem, rows: Rows, p: Tensor, work: Workspace) -> None:
        request, emit = self.request, self.request.emit
        factor = rows.to_weights
        if block.query_mask is not None:
            padding = ~block.query_mask[:, None, :, None]
            if bool((rows.to_weights.isnan() & padding).any()):
                # 0 times NaN is NaN, and whatever padding holds must not reach a statistic.
                p.masked_fill_(padding, 0)
            factor = factor.masked_fill(padding, 0)
        keys = (tile.b, h, tile.j)
        if emit.key_sum:
            self.found["key_sum"][keys] += (factor.mT @ p).squeeze(-2)
        if request.query_probes is not None:
            wanted = cut_broadcast(request.query_probes, (tile.b, h, tile.i, slice(None)))
            if wanted is not None:
                self.found["query_probes"][keys] += p.mT @ (wanted * factor)
        for number, size in enumerate(request.pools):
            add_block_sums(self.found[f"pooled {number}"][tile.b, h], size, tile, p, factor)
        if request.key_statistics and self.count_entries:
            self._count_readers(tile, h, counted(block))
        if request.pools or request.edges:
            self._count_entries(tile, h, counted(block), work)
        if not (emit.key_square or emit.key_max or emit.head_gram or request.edges):
            return
        if request.edges or emit.head_gram:
            p.mul_(factor)
            factor = torch.ones_like(factor)
            if request.edges:
                self._add_diagonals("by_distance", tile, h, p, work)
            if emit.head_gram:
                flat = p.reshape(*p.shape[:2], -1)
                self.found["head_gram"][tile.b] += flat @ flat.mT
        if emit.key_square or emit.key_max:
            square, largest = (
                self.found[name][keys] if name in self.found else None for name in ("key_square", "key_max")
            )
            steps().spend_over_queries(p, factor, square, largest, NEAR_SCORES)

    def _count_readers(self, tile: Tile, h: slice, block: Problem) -> None:
        """Add to `key_count`: for all heads with the first of them, where all have the same mask."""
        if all(mask is None or mask.shape[1] == 1 for mask in (self.problem.mask, self.problem.bias)):
            if tile.n.start > 0:
                return
            h = slice(0, self.problem.heads)
        counts = queries_seeing(block) if has_closed_form(block) else block.visible_float().sum(-2)
        self.found["key_count"][tile.b, h, tile.j] += counts

    def _count_entries(self, tile: Tile, h: slice, block: Problem, work: Workspace) -> None:
        counted = block.visible_float()
        ones = torch.ones_like(counted[..., :1])
        for number, size in enumerate(self.request.pools):
            add_block_sums(self.found[f"pooled_count {number}"][tile.b, h], size, tile, counted, ones)
        if self.request.edges:
            self._add_diagonals("distance_count", tile, h, counted, work)

    def _add_diagonals(self, name: str, tile: Tile, h: slice, p: Tensor, work: Workspace) -> None:
        """Each row moved right by its place from the end, so that diagonals stand in columns, which are then summed."""
        b, heads, n_q, n_k = p.shape
        if not n_k:
            return
        width = n_q + n_k - 1
        skewed = work.take(f"skewed {name}", b, heads, n_q, width).zero_()
        rows = n_q * width
        skewed.as_strided(p.shape, (heads * rows, rows, width - 1, 1), skewed.storage_offset() + n_q - 1).copy_(p)
        start = tile.j.start - tile.i.stop + self.problem.queries
        self.found[name][tile.b, h, start : start + width] += skewed.sum(-2)

    def finish(self) -> tuple[Tensor, Emitted]:
        """Closed-form counts, means and bins, once every tile was added."""
        problem, request, found = self.problem, self.request, dict[str, object](self.found)
        shape = (problem.batch, problem.heads, -1)
        if not self.count_entries:
            if request.emit.visible:
                found["visible"] = keys_seen(problem).expand(shape).clone()
            if request.key_statistics:
                found["key_count"] = queries_seeing(problem).expand(shape).clone()
        counts = [found.pop(f"pooled_count {number}") for number in range(len(request.pools))]
        sums = [found.pop(f"pooled {number}") for number in range(len(request.pools))]
        if request.pools:
            means = [s / c.clamp(min=1) for s, c in zip(sums, counts, strict=True)]  # type: ignore[attr-defined]
            found["pooled"] = tuple(means) if request.several_pools else means[0]
            found["pooled_count"] = tuple(counts) if request.several_pools else counts[0]
        if request.edges:
            for name, source in (("offsets", "by_distance"), ("offset_count", "distance_count")):
                profile = self.found[source]
                found.pop(source)
                bins = tuple(self._bins(profile, edges) for edges in request.edges)
                found[name] = bins if request.several_edges else bins[0]
        return self.out, Emitted(**found)  # type: ignore[arg-type]

    def _bins(self, profile: Tensor, edges: Tensor) -> Tensor:
        """Sums over bins of distances, in float64: counts pass 2^24. Column c holds distance Nq - 1 + offset - c."""
        running = pad(profile.double().cumsum(-1), (1, 0))
        n_q, n_k, offset = self.problem.queries, self.problem.keys, self.problem.offset
        high = n_q + offset - edges.clamp(offset - n_k, offset + n_q)
        sums = running[..., high[:-1]] - running[..., high[1:]]
        return sums.to(profile.dtype)


def add_block_sums(total: Tensor, size: int, tile: Tile, p: Tensor, factor: Tensor) -> None:
    """Add a tile's entries times a factor of each row to the sums over blocks of `size`, at the tile's place.

    Rows first, by one small product, then the columns of what is left.
    """
    if not p.shape[-1]:
        return
    first, last = tile.i.start // size, (tile.i.stop - 1) // size
    member = torch.arange(tile.i.start, tile.i.stop, device=p.device) // size - first
    member = one_hot(member, last - first + 1).to(p.dtype)
    sums = (member * factor).mT @ p
    start, stop = tile.j.start // size, -(-tile.j.stop // size)
    padding = (tile.j.start - start * size, stop * size - tile.j.stop)
    sums = pad(sums, padding).unflatten(-1, (stop - start, size)).sum(-1)
    total[:, :, first : last + 1, start:stop] += sums


class _Top(NamedTuple):
    values: Tensor
    keys: Tensor


def _top(entries: Tensor, k: int) -> _Top:
    """The k largest of each row in falling order; of equal ones the first keys, in their order."""
    values, keys = entries.topk(k, dim=-1)
    if bool(((entries >= values[..., -1:]).sum(-1) > k).any()):
        values, keys = torch.sort(entries, dim=-1, descending=True, stable=True)
        return _Top(values[..., :k], keys[..., :k])
    keys = keys.sort(-1).values
    values, order = entries.gather(-1, keys).sort(dim=-1, descending=True, stable=True)
    return _Top(values, keys.gather(-1, order))


def _visible_logits(block: Problem) -> Tensor:
    """[b, h, i, j], -inf where hidden."""
    seen = block.visible()
    return block.logits() if seen is None else block.logits().masked_fill(~seen, -math.inf)


def _to_keys(places: Tensor, tiles: list[Tile]) -> Tensor:
    """Which keys stand at these places of the rows."""
    keys = places + tiles[0].j.start
    for before, part in pairwise(tiles):
        keys = torch.where(keys < before.j.stop, keys, keys + (part.j.start - before.j.stop))
    return keys


def _from_keys(keys: Tensor, tiles: list[Tile]) -> tuple[Tensor, Tensor]:
    """Whether the rows hold these keys, and at which places."""
    inside, places, width = torch.zeros_like(keys, dtype=torch.bool), torch.zeros_like(keys), 0
    for part in tiles:
        here = (keys >= part.j.start) & (keys < part.j.stop)
        inside |= here
        places = torch.where(here, keys - part.j.start + width, places)
        width += part.j.stop - part.j.start
    return inside, places

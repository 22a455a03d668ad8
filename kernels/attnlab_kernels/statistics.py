"""Collects the statistics of a tile's rows into whole tensors (backend `tiled`).

What each row yields is written at its place; what sums over queries is added tile by tile, in the plan's fixed order,
so two runs give the same bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from attnlab_kernels.counts import has_closed_form, keys_seen, queries_seeing
from attnlab_kernels.emit import Emitted
from attnlab_kernels.problem import Problem, cut_broadcast
from attnlab_kernels.request import Request
from attnlab_kernels.rows import Rows, Workspace
from attnlab_kernels.tiles import Tile


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

    def add(self, tile: Tile, block: Problem, rows: Rows, work: Workspace) -> None:
        """Read everything asked for off a tile. The shares are overwritten last."""
        h = slice(tile.n.start * block.group, tile.n.stop * block.group)
        row = (tile.b, h, tile.i)
        self._write_rows(row, tile, block, rows)
        self._write_entries(tile, h, rows)
        self._add_over_queries(tile, h, block, rows, work)

    def _write_rows(self, row: tuple[slice, slice, slice], tile: Tile, block: Problem, rows: Rows) -> None:
        emit, found, p = self.request.emit, self.found, rows.near_shares
        self.out[row] = _grouped_product(p, block.v, block.group).mul_(rows.to_weights)
        if block.key_probes is not None:
            probes = block.key_probes.expand(block.batch, block.heads, -1, -1)
            found["key_probes"][row] = (p @ probes).mul_(rows.to_weights)
        if emit.lse:
            found["lse"][row] = rows.lse
        if rows.entropy is not None:
            found["entropy"][row] = rows.entropy
        if emit.max_probability:
            found["max_probability"][row] = rows.max_share
        if emit.argmax and rows.argmax is not None:
            found["argmax"][row] = torch.where(rows.argmax < 0, -1, rows.argmax + tile.j.start)
        if emit.collision:
            norm = torch.linalg.vector_norm(p, dim=-1)
            found["collision"][row] = (norm * rows.to_shares.squeeze(-1)).square_()
        if block.sinks is not None:
            sinks = block.sinks.to(block.dtype)[:, None]
            found["learned_sink_mass"][row] = torch.where(sinks == -math.inf, 0, torch.exp(sinks - rows.lse))
        if emit.top_k is not None and block.keys:
            k = min(emit.top_k, block.keys)
            values, keys = p.topk(k, dim=-1)
            absent = torch.arange(k, device=p.device) >= _visible_number(block)
            if bool((values == 0).logical_and_(~absent).any()):
                # Weights that underflow look like hidden entries, which must not be listed in their place.
                keys = _visible_logits(block).topk(k, dim=-1).indices
                values = p.gather(-1, keys)
            found["top_k_values"][row][..., :k] = (values * rows.to_shares).masked_fill_(absent, 0)
            found["top_k_keys"][row][..., :k] = (keys + tile.j.start).masked_fill_(absent, -1)

    def _write_entries(self, tile: Tile, h: slice, rows: Rows) -> None:
        request, p = self.request, rows.near_shares
        for name, index in (("gathered", request.gather), ("columns", request.columns)):
            if index is None or not p.shape[-1]:
                continue
            at = index[tile.b, None, tile.i] if name == "gathered" else index[tile.b, None, None]
            at = at.expand(-1, p.shape[1], p.shape[2], -1) - tile.j.start
            inside = (at >= 0) & (at < p.shape[-1])
            taken = p.gather(-1, torch.where(inside, at, 0)).mul_(rows.to_weights)
            self.found[name][tile.b, h, tile.i] = torch.where(inside, taken, 0)
        if request.rows is not None:
            index = request.rows[tile.b]
            batch, place = ((index >= tile.i.start) & (index < tile.i.stop)).nonzero(as_tuple=True)
            if len(batch):
                at = index[batch, place] - tile.i.start
                taken = p[batch, :, at] * rows.to_weights[batch, :, at]
                self.found["rows"][tile.b, h][batch, :, place, tile.j] = taken

    def _add_over_queries(self, tile: Tile, h: slice, block: Problem, rows: Rows, work: Workspace) -> None:
        request, emit, p = self.request, self.request.emit, rows.near_shares
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
            self._add_pool(f"pooled {number}", size, tile, h, p, factor)
        if (
            self.request.pools
            or self.request.edges
            or (self.count_entries and (request.key_statistics or emit.visible))
        ):
            self._count(tile, h, block, work)
        if not (emit.key_square or emit.key_max or emit.head_gram or request.edges):
            return
        p.mul_(factor)
        if request.edges:
            self._add_diagonals("by_distance", tile, h, p, work)
        if emit.key_max and block.queries:
            best = self.found["key_max"][keys]
            torch.maximum(best, p.amax(-2), out=best)
        if emit.head_gram:
            flat = p.reshape(*p.shape[:2], -1)
            self.found["head_gram"][tile.b] += flat @ flat.mT
        if emit.key_square:
            self.found["key_square"][keys] += p.square_().sum(-2)

    def _count(self, tile: Tile, h: slice, block: Problem, work: Workspace) -> None:
        emit = self.request.emit
        counted = block.visible_float()
        if self.request.key_statistics and self.count_entries:
            self.found["key_count"][tile.b, h, tile.j] += counted.sum(-2)
        ones = torch.ones_like(counted[..., :1])
        for number, size in enumerate(self.request.pools):
            self._add_pool(f"pooled_count {number}", size, tile, h, counted, ones)
        if self.request.edges:
            self._add_diagonals("distance_count", tile, h, counted, work)
        if emit.visible and self.count_entries:
            self.found["visible"][tile.b, h, tile.i] = _visible_number(block).squeeze(-1)

    def _add_pool(self, name: str, size: int, tile: Tile, h: slice, p: Tensor, factor: Tensor) -> None:
        """Rows first, by one small product, then the columns of what is left."""
        if not p.shape[-1] or tile.j.start == tile.j.stop:
            return
        first, last = tile.i.start // size, (tile.i.stop - 1) // size
        member = torch.arange(tile.i.start, tile.i.stop, device=p.device) // size - first
        member = one_hot(member, last - first + 1).to(p.dtype)
        sums = (member * factor).mT @ p
        start, stop = tile.j.start // size, -(-tile.j.stop // size)
        padding = (tile.j.start - start * size, stop * size - tile.j.stop)
        sums = pad(sums, padding).unflatten(-1, (stop - start, size)).sum(-1)
        self.found[name][tile.b, h, first : last + 1, start:stop] += sums

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


def _grouped_product(p: Tensor, v: Tensor, group: int) -> Tensor:
    """[b, h, i, j] times [b, n, j, d] with each key head shared by `group` query heads."""
    b, h, n_q, n_k = p.shape
    flat = p.view(b * h // group, group * n_q, n_k)
    return torch.bmm(flat, v.reshape(b * h // group, n_k, v.shape[-1])).view(b, h, n_q, v.shape[-1])


def _visible_logits(block: Problem) -> Tensor:
    """[b, h, i, j], -inf where hidden."""
    seen = block.visible()
    return block.logits() if seen is None else block.logits().masked_fill(~seen, -math.inf)


def _visible_number(block: Problem) -> Tensor:
    """[b or 1, h or 1, i, 1], how many keys each row sees."""
    if has_closed_form(block):
        return keys_seen(block)[..., None]
    seen = block.visible()
    if seen is None:
        return torch.full((1, 1, block.queries, 1), block.keys, dtype=block.dtype, device=block.q.device)
    return seen.expand(-1, -1, block.queries, block.keys).sum(-1, keepdim=True).to(block.dtype)

"""Backend `dense`: materialises the pattern and reads every statistic off it, each in its plainest form.

The oracle of the tests, in any precision up to float64. Gradients are plain autograd.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from attnlab_kernels.emit import Emitted
from attnlab_kernels.problem import Problem
from attnlab_kernels.request import Request


def dense_attention(problem: Problem, request: Request) -> tuple[Tensor, Emitted]:
    """Output [B, Hq, Nq, Dv] in q's dtype and the statistics in float32, or in float64 from float64 inputs."""
    pattern = Pattern(problem)
    out = pattern.read(problem.v).to(problem.q.dtype)
    emit = request.emit
    found: dict[str, object] = {}
    if emit.lse:
        found["lse"] = pattern.lse
    if emit.entropy:
        found["entropy"] = pattern.entropy()
    if problem.key_probes is not None:
        found["key_probes"] = pattern.weights @ problem.key_probes
    with torch.no_grad():
        found |= _row_statistics(pattern, request)
        found |= _entries(pattern, request)
        found |= _query_side(pattern, request)
    return out, Emitted(**found)  # type: ignore[arg-type]


class Pattern:
    """The whole attention pattern of a problem.

    Attributes:
        seen: [b, h, i, j], whether the query sees the key.
        weights: [b, h, i, j], the pattern A that is read; its rows sum to 1 under softmax without a learned sink.
        shares: [b, h, i, j], A divided by its row sum, a learned sink counted in the sum. A itself under softmax.
        lse: [b, h, i].
    """

    def __init__(self, problem: Problem) -> None:
        shape = (problem.batch, problem.heads, problem.queries, problem.keys)
        visible = problem.visible()
        everything = torch.ones((), dtype=torch.bool, device=problem.q.device)
        self.seen = (everything if visible is None else visible).expand(shape)
        self.group = problem.group
        self.logits = torch.where(self.seen, problem.logits(), -math.inf)
        columns = self.logits
        if problem.sinks is not None:
            sink = problem.sinks.to(problem.dtype)[:, None, None].expand(*shape[:3], 1)
            columns = torch.cat([columns, sink], dim=-1)
        top = (
            columns.detach().amax(-1, keepdim=True)
            if columns.shape[-1]
            else columns.new_full((*shape[:3], 1), -math.inf)
        )
        top = torch.where(top == -math.inf, 0, top)
        exponentials = torch.exp(columns - top)
        total = exponentials.sum(-1, keepdim=True)
        # A row that sees no key has total 0; its logarithm and its shares must stay finite for the gradients.
        empty = total == 0
        log_total = torch.log(torch.where(empty, 1, total))
        self.lse = torch.where(empty, -math.inf, top + log_total).squeeze(-1)
        self.all_shares = exponentials / torch.where(empty, 1, total)
        self.log_shares = torch.where(columns == -math.inf, 0, columns - top - log_total)
        self.shares = self.all_shares[..., : shape[3]]
        self.weights = torch.exp(self.logits) if problem.normalizer == "sigmoid" else self.shares
        every = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=problem.q.device)
        self.counts = every if problem.query_mask is None else problem.query_mask[:, None, :, None]
        self.offset = problem.distances()

    def read(self, values: Tensor) -> Tensor:
        """A times values [b, n, j, dv], shared by the query heads of a group: [b, h, i, dv]."""
        return self.weights @ values.to(self.weights.dtype).repeat_interleave(self.group, dim=1)

    def entropy(self) -> Tensor:
        """[b, h, i], -sum p ln p in nats."""
        return -(self.all_shares * self.log_shares).sum(-1)


def _row_statistics(pattern: Pattern, request: Request) -> dict[str, object]:
    emit, found = request.emit, dict[str, object]()
    shares, n_k = pattern.shares, pattern.shares.shape[-1]
    if emit.max_probability:
        found["max_probability"] = shares.amax(-1) if n_k else shares.sum(-1)
    if emit.argmax:
        none = torch.full(shares.shape[:3], -1, device=shares.device)
        found["argmax"] = torch.where(pattern.seen.any(-1), pattern.logits.argmax(-1), none) if n_k else none
    if emit.collision:
        found["collision"] = shares.square().sum(-1)
    if emit.visible:
        found["visible"] = pattern.seen.to(shares.dtype).sum(-1)
    if pattern.all_shares.shape[-1] > n_k:
        found["learned_sink_mass"] = pattern.all_shares[..., -1]
    if emit.top_k is not None:
        k = min(emit.top_k, n_k)
        values, keys = torch.sort(pattern.logits, dim=-1, descending=True, stable=True)
        hidden = values[..., :k] == -math.inf
        pad = (0, emit.top_k - k)
        values = shares.gather(-1, keys[..., :k]).masked_fill(hidden, 0)
        found["top_k_values"] = torch.nn.functional.pad(values, pad)
        found["top_k_keys"] = torch.nn.functional.pad(keys[..., :k].masked_fill(hidden, -1), pad, value=-1)
    return found


def _entries(pattern: Pattern, request: Request) -> dict[str, object]:
    found: dict[str, object] = {}
    weights = pattern.weights
    _, h, n_q, n_k = weights.shape
    if request.gather is not None:
        index = request.gather[:, None].expand(-1, h, -1, -1)
        found["gathered"] = _take(weights, index, 3)
    if request.rows is not None:
        found["rows"] = _take(weights, request.rows[:, None, :, None].expand(-1, h, -1, n_k), 2)
    if request.columns is not None:
        found["columns"] = _take(weights, request.columns[:, None, None, :].expand(-1, h, n_q, -1), 3)
    return found


def _take(source: Tensor, index: Tensor, dim: int) -> Tensor:
    if source.shape[dim] == 0:
        return source.new_zeros(index.shape)
    return torch.where(index < 0, 0, source.gather(dim, index.clamp(min=0)))


def _query_side(pattern: Pattern, request: Request) -> dict[str, object]:
    """What sums over queries: only rows that count, padding left out."""
    emit, found = request.emit, dict[str, object]()
    read = torch.where(pattern.counts, pattern.weights, 0)
    counted = (pattern.seen & pattern.counts).to(read.dtype)
    b, h, n_q, n_k = read.shape
    if emit.key_sum:
        found["key_sum"] = read.sum(-2)
    if emit.key_square:
        found["key_square"] = read.square().sum(-2)
    if emit.key_max:
        found["key_max"] = read.amax(-2) if n_q else read.sum(-2)
    if request.key_statistics:
        found["key_count"] = counted.sum(-2)
    if request.query_probes is not None:
        found["query_probes"] = read.transpose(-1, -2) @ request.query_probes
    if emit.head_gram:
        flat = read.reshape(b, h, n_q * n_k)
        found["head_gram"] = flat @ flat.transpose(-1, -2)
    if request.pools:
        maps = [(block_sums(read, size), block_sums(counted, size)) for size in request.pools]
        means = tuple(sums / counts.clamp(min=1) for sums, counts in maps)
        found["pooled"] = means if request.several_pools else means[0]
        found["pooled_count"] = tuple(counts for _, counts in maps) if request.several_pools else maps[0][1]
    if request.edges:
        sums = tuple(_bin_sums(read, pattern.offset, edges) for edges in request.edges)
        counts = tuple(_bin_sums(counted, pattern.offset, edges) for edges in request.edges)
        found["offsets"] = sums if request.several_edges else sums[0]
        found["offset_count"] = counts if request.several_edges else counts[0]
    return found


def block_sums(entries: Tensor, size: int) -> Tensor:
    """[b, h, i, j] summed over blocks of `size` queries and keys."""
    b, h, n_q, n_k = entries.shape
    rows, columns = -(-n_q // size), -(-n_k // size)
    padded = torch.nn.functional.pad(entries, (0, columns * size - n_k, 0, rows * size - n_q))
    return padded.view(b, h, rows, size, columns, size).sum((3, 5))


def _bin_sums(entries: Tensor, distance: Tensor, edges: Tensor) -> Tensor:
    inside = [(distance >= low) & (distance < high) for low, high in pairwise(edges.tolist())]
    return torch.stack([torch.where(here, entries, 0).sum((-1, -2)) for here in inside], dim=-1)

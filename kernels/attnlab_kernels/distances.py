"""How many entries stand at each distance i + offset - j, and sums over bins of distances."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnlab_kernels.problem import Problem


def has_closed_form_at_distances(problem: Problem) -> bool:
    """Whether positions alone say what is visible to queries that count."""
    padding = (problem.key_mask, problem.query_mask)
    listed = (problem.query_segments, problem.mask, problem.bias)
    return all(option is None for option in (*padding, *listed))


def entries_at(problem: Problem, distance: Tensor) -> Tensor:
    """[b or 1, distances] int64, the visible entries at each distance."""
    # Of the keys at one distance, those from `start` to before `stop` have a query.
    start = (problem.offset - distance).clamp(min=0)
    stop = torch.clamp(problem.queries + problem.offset - distance, max=problem.keys)
    limit = torch.full_like(distance, problem.keys)
    if problem.window is not None:
        limit = torch.where(distance.abs() < problem.window, limit, problem.first_tokens)
    if problem.causal:
        limit = torch.where(distance >= 0, limit, 0)
    limit = limit[None]
    if problem.prefix is not None:
        limit = torch.maximum(limit, problem.prefix[:, None])
    return (torch.minimum(stop, limit) - start).clamp(min=0)


def bin_sums(sums: Tensor, starts: Tensor, edges: Tensor) -> Tensor:
    """Add up sums over narrow bins into wider ones.

    Args:
        sums: [..., n], of the distances from `starts[m]` to before `starts[m + 1]`; the last bin is open.
        starts: [n] sorted.
        edges: [bins + 1]; each is one of `starts`, or lies outside of all distances with a sum.
    """
    running = pad(sums.cumsum(-1), (1, 0))
    place = torch.searchsorted(starts, edges)
    return running[..., place[1:]] - running[..., place[:-1]]

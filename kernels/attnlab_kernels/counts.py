"""How many keys each query sees and how many queries see each key, without a look at entries where possible.

Causality, window, first tokens and prefix leave each query two intervals of keys and each key one interval of queries,
so their counts are differences of the running counts of the padding masks. Segments, boolean masks and biases that hold
-inf have to be counted entry by entry, which the backends do as they read them.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from attnlab_kernels.problem import Problem


def has_closed_form(problem: Problem) -> bool:
    """Whether the counts follow from positions and padding masks alone."""
    return problem.query_segments is None and problem.mask is None and problem.bias is None


def keys_seen(problem: Problem) -> Tensor:
    """[b, 1, i], the number of keys that each query sees."""
    n_k, device = problem.keys, problem.q.device
    position = torch.arange(problem.queries, device=device)[None] + problem.offset
    left, right = torch.zeros_like(position), torch.full_like(position, n_k)
    first = torch.zeros_like(position)
    if problem.window is not None:
        left, right = position - problem.window + 1, position + problem.window
        first = first + problem.first_tokens
    if problem.causal:
        right = torch.minimum(right, position + 1)
        first = torch.minimum(first, position + 1)
    if problem.prefix is not None:
        first = torch.maximum(first, problem.prefix[:, None])
    running = _running_count(problem.key_mask, problem.batch, n_k, device)
    first = first.clamp(0, n_k).expand(problem.batch, -1)
    left = torch.maximum(left.clamp(0, n_k), first)
    right = torch.maximum(right.clamp(0, n_k), left)
    seen = running.gather(1, first) + running.gather(1, right) - running.gather(1, left)
    return seen[:, None].to(problem.dtype)


def queries_seeing(problem: Problem) -> Tensor:
    """[b, 1, j], the number of queries that count and see each key."""
    n_q, device = problem.queries, problem.q.device
    key = torch.arange(problem.keys, device=device)[None]
    position = key - problem.offset
    start, stop = torch.zeros_like(key), torch.full_like(key, n_q)
    if problem.window is not None:
        near = key >= problem.first_tokens
        start = torch.where(near, position - problem.window + 1, start)
        stop = torch.where(near, position + problem.window, stop)
    if problem.causal:
        start = torch.maximum(start, position)
    if problem.prefix is not None:
        before = key < problem.prefix[:, None]
        start, stop = torch.where(before, 0, start), torch.where(before, n_q, stop)
    running = _running_count(problem.query_mask, problem.batch, n_q, device)
    start = start.clamp(0, n_q).expand(problem.batch, -1)
    stop = torch.maximum(stop.clamp(0, n_q), start)
    seeing = running.gather(1, stop) - running.gather(1, start)
    if problem.key_mask is not None:
        seeing = seeing * problem.key_mask
    return seeing[:, None].to(problem.dtype)


def visible_number(blocks: list[Problem]) -> Tensor:
    """[b or 1, h or 1, i, 1], how many keys each row sees, in blocks that hold the same queries and different keys."""
    first, *others = (_seen_in(counted(block)) for block in blocks)
    return sum(others, start=first)


def counted(block: Problem) -> Problem:
    """What decides which entries count: all but a bias that hides nothing."""
    hides = block.bias is not None and not (block.bias.numel() and bool(block.bias.amin() > -math.inf))
    return block if hides else replace(block, bias=None)


def _seen_in(block: Problem) -> Tensor:
    if has_closed_form(block):
        return keys_seen(block)[..., None]
    seen = block.visible()
    if seen is None:
        return torch.full((1, 1, block.queries, 1), block.keys, dtype=block.dtype, device=block.q.device)
    return seen.expand(-1, -1, block.queries, block.keys).sum(-1, keepdim=True).to(block.dtype)


def _running_count(mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """[b, length + 1], how many positions before each one exist."""
    ones = torch.ones(1, length, dtype=torch.bool, device=device) if mask is None else mask
    running = torch.zeros(batch, length + 1, dtype=torch.long, device=device)
    running[:, 1:] = ones.long().cumsum(1)
    return running

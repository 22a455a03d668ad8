"""Whole rows of a tile: scores, masks, softmax and row statistics in reused buffers (backend `tiled`).

Each row is centred on its largest logit m before anything is summed, so with t = s - m
entropy = ln Z - sum(e^t t) / Z keeps its digits whatever the size of the logits; see also arXiv 2205.14135.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from attnlab_kernels.hidden import hidden_parts
from attnlab_kernels.inner_loop import LEAST_ROWS, NEAR_SCORES, chunk_scores, steps
from attnlab_kernels.problem import Problem
from attnlab_kernels.tile_parts import Hiding, Logits, Numbers, Spending, Sums
from attnlab_kernels.workspace import Workspace

_LOG_2 = math.log(2)
_LARGE = 1024
"""Logits from which on the rounding by one more factor shows beside the others."""


class Asked(NamedTuple):
    """What is asked of a tile's rows beside lse and the largest share."""

    entropy: bool = False
    argmax: bool = False
    collision: bool = False


@dataclass(frozen=True, eq=False)
class Rows:
    """What a tile's rows sum to.

    Attributes:
        to_weights, to_shares: [b, h, i, 1]; near shares (see `softmax_parts`) times these are A, and A over its row
            sum, a sink counted in.
        lse, max_share: [b, h, i]; max_share is the largest share of a key.
        entropy, argmax, collision: [b, h, i]; None where not asked for. argmax counts from the tile's first key, -1 for
            none.
    """

    to_weights: Tensor
    to_shares: Tensor
    lse: Tensor
    max_share: Tensor
    entropy: Tensor | None
    argmax: Tensor | None
    collision: Tensor | None


@dataclass(frozen=True, eq=False)
class OverQueries:
    """Take the sums of A and of A^2 and the largest A over a tile's queries that count, [b, h, j]."""

    key_sum: Tensor | None = None
    key_square: Tensor | None = None
    key_max: Tensor | None = None


def softmax_parts(
    blocks: list[Problem], work: Workspace, asked: Asked, out: Tensor | None = None
) -> tuple[Tensor, Rows]:
    """Near shares [b, h, i, j] in a buffer, and their rows, of blocks with the same queries and different keys.

    The keys stand side by side in the rows. Near shares are A over its row sum but for a factor a row, 0 where hidden.
    `out` [b, h, i, dv] takes A V.
    """
    block, n_k = blocks[0], sum(block.keys for block in blocks)
    p = work.take("shares", block.batch, block.heads, block.queries, n_k)
    spending = None if out is None else _spending(blocks, out, OverQueries())
    return p, _rows(blocks, work, asked, _split(p, block), spending)


def spend_parts(blocks: list[Problem], work: Workspace, asked: Asked, out: Tensor, over: OverQueries) -> Rows:
    """The same where weights are not kept: they are spent on `out` and on what is not None in `over`."""
    return _rows(blocks, work, asked, None, _spending(blocks, out, over))


def _spending(blocks: list[Problem], out: Tensor, over: OverQueries) -> Spending:
    block = blocks[0]
    return Spending(
        v=_side_by_side([one.v for one in blocks], 2),
        out=_split(out, block),
        sink=_by_head(block.sinks, block),
        padding=None if block.query_mask is None else ~block.query_mask[:, None, None, :, None],
        **{name: None if x is None else _split(x, block) for name, x in vars(over).items()},
    )


def _rows(blocks: list[Problem], work: Workspace, asked: Asked, p: Tensor | None, spending: Spending | None) -> Rows:
    block = blocks[0]

    def take(unit: float, fill: bool = False) -> _Found:
        return _sum_rows(_logits(blocks, work, unit, fill), unit, asked, work, p, spending)

    # Exponents of two, since torch's exponential is twenty times slower on -inf and wherever it underflows. The factor
    # that makes them rides along with another where no logit loses digits by it that matter.
    unit = _LOG_2 if block.bias is None and block.normalizer == "softmax" and not work.large else 1.0
    found = take(unit)
    fill = math.isnan(found.highest)
    if fill:
        # What is hidden may hold infinity or NaN, which -inf does not hide by being added.
        found = take(unit, fill)
    if unit != 1:
        work.large = _too_large(found)
        if work.large:
            unit = 1.0
            found = take(unit, fill)
    return _finished(found, unit, block)


def _split(x: Tensor, block: Problem) -> Tensor:
    """[b or 1, h or 1, ...] as [b or 1, n or 1, g or 1, ...]."""
    return x.unflatten(1, (block.key_heads, block.group) if x.shape[1] == block.heads else (1, 1))


def _by_head(x: Tensor | None, block: Problem, unit: float = 1.0) -> Tensor | None:
    """[h] as [1, n, g, 1, 1] over `unit`, in the precision of the sums."""
    return None if x is None else (x.to(block.dtype) / unit).view(1, block.key_heads, block.group, 1, 1)


def _side_by_side(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _too_large(found: _Found) -> bool:
    """Whether a row that sees a key has logits so large that each rounding shows."""
    if found.lowest > -math.inf:
        return found.highest > _LARGE or found.lowest < -_LARGE
    return bool(((found.top.abs() > _LARGE) & (found.top != -math.inf)).any())


def _finished(found: _Found, unit: float, block: Problem) -> Rows:
    """What each row's sums give. Nearly every tile has a key for each of its rows, and is spared the questions."""
    empty: Tensor | None = None
    total = found.total
    if not found.lowest > -math.inf:
        empty = found.top == -math.inf
        total = torch.where(empty, 1, total)
    top, lse, to_shares, own_entropy = steps().row_results(found.top, total, found.product, unit)
    if block.sinks is not None:
        sink = block.sinks.to(block.dtype)[:, None, None]
        lse, share, own_entropy = steps().with_sink(sink, top, total, own_entropy)
        to_shares = share / total
    if empty is not None:
        to_shares = torch.where(empty, 0, to_shares)
        own_entropy = None if own_entropy is None else torch.where(empty, 0, own_entropy)
    best = found.best
    if best is not None and empty is not None:
        best = torch.where(empty, -1, best)
    to_weights = torch.exp(top) if block.normalizer == "sigmoid" else to_shares
    of_weights = to_shares
    if found.largest is not None:
        to_weights = torch.where(found.largest == 1, to_weights, 1)
        of_weights = to_shares / found.largest
    return Rows(
        to_weights=to_weights,
        to_shares=of_weights,
        lse=lse.squeeze(-1),
        max_share=to_shares.squeeze(-1),
        entropy=None if own_entropy is None else own_entropy.squeeze(-1),
        argmax=None if best is None else best.squeeze(-1),
        collision=None if found.norm is None else (found.norm * to_shares).square_().squeeze(-1),
    )


class _Found(NamedTuple):
    """`Sums` of a tile as [b, h, i, 1]; `lowest` and `highest` are of `top`, NaN where that holds one."""

    top: Tensor
    total: Tensor
    product: Tensor | None
    largest: Tensor | None
    best: Tensor | None
    norm: Tensor | None
    lowest: float
    highest: float


def _sum_rows(
    logits: Logits, unit: float, asked: Asked, work: Workspace, p: Tensor | None, spending: Spending | None
) -> _Found:
    """Take a tile through all steps: weights go to `p`, or where `spending` says."""
    q = logits.q
    shape = (*q.shape[:4], 1)
    top, total = q.new_empty(2, *shape)
    product = q.new_empty(shape) if asked.entropy else None
    # The order of sigmoids that round to 1 is in their logarithms alone.
    largest = q.new_empty(shape) if logits.sigmoid and not asked.argmax else None
    best = torch.empty(shape, dtype=torch.long, device=q.device) if asked.argmax else None
    norm = q.new_empty(shape) if asked.collision else None
    limits = torch.finfo(q.dtype)
    numbers = Numbers(
        unit=unit,
        to_base_2=1.0 if unit != 1 else 1 / _LOG_2,
        lowest=limits.min,
        tiny=limits.tiny,
        flushes=work.flushes,
        precision=limits.eps,
        large_sigmoid=2.0**-20,
        near=NEAR_SCORES,
        least=LEAST_ROWS,
    )
    if spending is not None:
        for x in (spending.key_sum, spending.key_square, spending.key_max):
            if x is not None:
                x.zero_()
    size = chunk_scores(logits, numbers)
    s, chunk = work.take("scores", size), work.take("chunk", size)
    sums = Sums(top, total, product, largest, best, norm, p)
    low, high = steps().tile_rows(logits, sums, spending, numbers, s, chunk).tolist()
    product, largest, best, norm = (None if x is None else x.flatten(1, 2) for x in (product, largest, best, norm))
    return _Found(top.flatten(1, 2), total.flatten(1, 2), product, largest, best, norm, low, high)


def spans(blocks: list[Problem]) -> list[slice]:
    """Where each block's keys stand in the rows."""
    stops = list(accumulate(block.keys for block in blocks))
    return [slice(stop - block.keys, stop) for stop, block in zip(stops, blocks, strict=True)]


def _logits(blocks: list[Problem], work: Workspace, unit: float, fill: bool = False) -> Logits:
    """What the logits of blocks are made of, over `unit`; the blocks' keys stand side by side."""
    block = blocks[0]
    factor = block.scale / (unit if block.softcap is None else block.softcap)
    q = torch.mul(block.q, factor) if block.q.dtype == block.dtype else block.q.to(block.dtype).mul_(factor)
    terms: list[Tensor] = []
    hiding: list[Hiding] = []
    if block.bias is not None:
        biases = [one.bias.to(one.dtype).expand(-1, -1, -1, one.keys) for one in blocks if one.bias is not None]
        terms.append(_split(_side_by_side(biases, -1), block))
        hiding.append(Hiding(0, terms[0].shape[-1], terms[0], added=True, by_causality=False))
    distances: Tensor | None = None
    if block.alibi is not None:
        distances = _split(_side_by_side([work.distances(one)[None] for one in blocks], -1), block)
    if block.relative_bias is not None:
        terms.append(_split(_side_by_side([work.relative_bias(one)[None] for one in blocks], -1), block))
    for number, (at, one) in enumerate(zip(spans(blocks), blocks, strict=True)):
        for part in hidden_parts(one, work, number):
            numbers = _split(part.numbers, block)
            hiding.append(part._replace(first=at.start + part.first, last=at.start + part.last, numbers=numbers))
    return Logits(
        q=_split(q, block).contiguous(),
        k=_side_by_side([one.k for one in blocks], 2),
        cap=0.0 if block.softcap is None else block.softcap / unit,
        terms=terms,
        alpha=1 / unit,
        distances=distances,
        slopes=_by_head(block.alibi, block, -unit),
        sigmoid=block.normalizer == "sigmoid",
        sigmoid_bias=_by_head(block.sigmoid_bias, block, unit),
        hiding=hiding,
        fill=fill,
        causal=block.causal and len(blocks) == 1,
        offset=block.offset,
        first=0 if block.prefix is None else int(block.prefix.max()),
    )

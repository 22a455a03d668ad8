"""Whole rows of a tile: scores, masks, softmax and row statistics in reused buffers (backend `tiled`).

Each row is centred on its largest logit m before anything is summed, so with t = s - m
entropy = ln Z - sum(e^t t) / Z keeps its digits whatever the size of the logits; see also arXiv 2205.14135.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from attnlab_kernels.hidden import hidden_parts
from attnlab_kernels.problem import Problem
from attnlab_kernels.workspace import Workspace

_LOG_2 = math.log(2)
_LARGE = 1024
"""Logits from which on the rounding by one more factor shows beside the others."""


@dataclass(frozen=True, eq=False)
class Rows:
    """A tile's rows.

    Attributes:
        near_shares: [b, h, i, j], A over its row sum but for a factor a row; 0 where hidden. A buffer.
        to_weights, to_shares: [b, h, i, 1]; near_shares times these are A, and A over its row sum, a sink counted in.
        lse, max_share: [b, h, i]; max_share is the largest share of a key.
        entropy, argmax: [b, h, i]; None where not asked for. argmax counts from the tile's first key, -1 for none.
    """

    near_shares: Tensor
    to_weights: Tensor
    to_shares: Tensor
    lse: Tensor
    max_share: Tensor
    entropy: Tensor | None
    argmax: Tensor | None


def softmax_rows(block: Problem, work: Workspace, entropy: bool, argmax: bool) -> Rows:
    """Scores of a block of queries with all the keys they see, and what each row's sums give."""
    return softmax_parts([block], work, entropy, argmax)


def softmax_parts(blocks: list[Problem], work: Workspace, entropy: bool, argmax: bool) -> Rows:
    """The same for blocks that hold the same queries and different keys, which stand side by side in the rows."""
    block, n_k = blocks[0], sum(block.keys for block in blocks)
    b, h, n_q = block.batch, block.heads, block.queries
    s = work.take("scores", b, h, n_q, n_k)
    # Exponents of two, since torch's exponential is twenty times slower on -inf and wherever it underflows. The factor
    # that makes them rides along with another where no logit loses digits by it that matter.
    unit = _LOG_2 if block.bias is None and block.normalizer == "softmax" else 1.0
    hidden = _logits_into(s, blocks, work, unit)
    top, best = _largest(s, argmax)
    if unit != 1 and bool(((top.abs() > _LARGE) & (top != -math.inf)).any()):
        unit = 1.0
        _logits_into(s, blocks, work, unit)
        top, best = _largest(s, argmax)
    if bool(top.isnan().any()):
        # What is hidden may hold infinity or NaN, which -inf does not hide by being added.
        _logits_into(s, blocks, work, unit, fill=True)
        top, best = _largest(s, argmax)
    p = work.take("shares", b, h, n_q, n_k)
    empty = top == -math.inf
    s.sub_(torch.where(empty, 0, top))
    top = top * unit
    if unit == 1:
        s.mul_(1 / _LOG_2)
    torch.exp2(s, out=p)
    # Products of numbers too small to be normal take a hundred times as long, and as shares these are nothing.
    torch.threshold_(p, torch.finfo(p.dtype).tiny, 0)
    total = torch.where(empty, 1, p.sum(-1, keepdim=True))
    log_total = torch.log(total)
    own_entropy: Tensor | None = None
    if entropy:
        for at in hidden:
            s[..., at].clamp_(min=torch.finfo(s.dtype).min)
        own_entropy = log_total - s.mul_(p).sum(-1, keepdim=True) * _LOG_2 / total
    lse, share = top + log_total, torch.ones_like(top)
    if block.sinks is not None:
        lse, share, own_entropy = _with_sink(block.sinks.to(block.dtype)[:, None, None], top, log_total, own_entropy)
    to_shares = torch.where(empty, 0, share / total)
    return Rows(
        near_shares=p,
        to_weights=torch.exp(top) if block.normalizer == "sigmoid" else to_shares,
        to_shares=to_shares,
        lse=lse.squeeze(-1),
        max_share=to_shares.squeeze(-1),
        entropy=None if own_entropy is None else torch.where(empty, 0, own_entropy).squeeze(-1),
        argmax=best,
    )


def spans(blocks: list[Problem]) -> list[slice]:
    """Where each block's keys stand in the rows."""
    stops = list(accumulate(block.keys for block in blocks))
    return [slice(stop - block.keys, stop) for stop, block in zip(stops, blocks, strict=True)]


def _largest(s: Tensor, argmax: bool) -> tuple[Tensor, Tensor | None]:
    """[b, h, i, 1], the largest logit, and [b, h, i], its place; -inf and -1 in rows that see no key."""
    if not s.shape[-1]:
        top = s.new_full((*s.shape[:-1], 1), -math.inf)
        return top, torch.full(s.shape[:-1], -1, device=s.device) if argmax else None
    if not argmax:
        return s.amax(-1, keepdim=True), None
    top, best = s.max(-1, keepdim=True)
    return top, torch.where(top == -math.inf, -1, best).squeeze(-1)


def _logits_into(s: Tensor, blocks: list[Problem], work: Workspace, unit: float, fill: bool = False) -> list[slice]:
    """Write the logits of all blocks, and say where entries are hidden."""
    hidden = []
    for at, block in zip(spans(blocks), blocks, strict=True):
        inside = _visible_logits_into(s[..., at], block, work, unit, fill)
        hidden += [slice(at.start + where.start, at.start + where.stop) for where in inside]
    return hidden


def _visible_logits_into(s: Tensor, block: Problem, work: Workspace, unit: float, fill: bool) -> list[slice]:
    """Write a block's logits over `unit`, -inf where hidden, and say where entries are hidden."""
    factor = block.scale / (unit if block.softcap is None else block.softcap)
    q = torch.mul(block.q, factor) if block.q.dtype == block.dtype else block.q.to(block.dtype).mul_(factor)
    rows = (block.batch * block.key_heads, block.group * block.queries)
    k = block.k.reshape(rows[0], block.keys, q.shape[-1])
    if s.is_contiguous():
        torch.bmm(q.reshape(*rows, q.shape[-1]), k.mT, out=s.view(*rows, block.keys))
    else:
        s.copy_(torch.bmm(q.reshape(*rows, q.shape[-1]), k.mT).view(s.shape))
    if block.softcap is not None:
        s.tanh_().mul_(block.softcap / unit)
    if block.bias is not None:
        s.add_(block.bias.to(block.dtype))
    if block.alibi is not None:
        s.addcmul_(work.distances(block), block.alibi.to(block.dtype)[:, None, None], value=-1 / unit)
    if block.relative_bias is not None:
        s.add_(work.relative_bias(block), alpha=1 / unit)
    if block.normalizer == "sigmoid":
        if block.sigmoid_bias is not None:
            s.add_(block.sigmoid_bias.to(block.dtype)[:, None, None])
        _log_sigmoid_(s, work.take("shares", *s.shape))
    places = []
    if block.bias is not None:
        places.append(slice(0, block.keys))
        if fill:
            s.masked_fill_(block.bias == -math.inf, -math.inf)
    for at, hidden in hidden_parts(block, work):
        places.append(at)
        if fill:
            s[..., at].masked_fill_(hidden == -math.inf, -math.inf)
        else:
            s[..., at].add_(hidden)
    return places


def _log_sigmoid_(s: Tensor, spare: Tensor) -> None:
    """ln sigmoid(x) = min(x, 0) - ln(1 + e^-|x|), in place; torch's own takes three times as long."""
    torch.abs(s, out=spare)
    torch.exp2(spare.mul_(-1 / _LOG_2), out=spare).add_(1).log_()
    s.clamp_(max=0).sub_(spare)


def _with_sink(
    sink: Tensor, top: Tensor, log_total: Tensor, entropy: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Lse and entropy with one more logit, and the share that is left to the keys.

    The entropy follows by grouping: that of the choice between keys and sink, plus the keys' own times their share.
    """
    pivot = torch.maximum(top, sink)
    pivot = torch.where(pivot == -math.inf, 0, pivot)
    keys, other = top - pivot + log_total, sink - pivot
    log_sum = torch.log(torch.exp(keys) + torch.exp(other))
    share = torch.exp(keys - log_sum)
    if entropy is not None:
        entropy = share * entropy + torch.special.entr(share) + torch.special.entr(torch.exp(other - log_sum))
    return pivot + log_sum, share, entropy


def in_compute_precision(problem: Problem) -> Problem:
    """The problem with keys, values laid out for batched products; a copy only where the caller's layout is another."""
    k, v = (tensor.to(problem.dtype).contiguous() for tensor in (problem.k, problem.v))
    return replace(problem, k=k, v=v)

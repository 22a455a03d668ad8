"""Gradients of the `tiled` backend: the pattern is recomputed tile by tile, as FlashAttention does (arXiv 2205.14135).

With t = ln P of a row's shares P, dP = dO V^T + dF F^T, delta = sum_j P dP and H the row's entropy, the logits get
ds = P (dP - (delta - dLSE + dH H) - dH t); under the sigmoid normaliser, whose output reads A unnormalised,
ds = A dP - P (dH H - dLSE) - P dH t. A learned sink is one more logit, of dP = 0.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot, pad

from attnlab_kernels.gradients import ResultGradients
from attnlab_kernels.problem import Problem, relative_buckets
from attnlab_kernels.strips import run_strips
from attnlab_kernels.tiles import CACHE_SCORES, Tile, plan_strips
from attnlab_kernels.workspace import Workspace

SHARED = ("alibi", "sinks", "sigmoid_bias", "relative_bias", "key_probes")
"""Small tensors that several strips may add to: each strip has sums of its own, which are added in its order."""

BUFFERS = 4
"""How many more tensors of a tile's size the backward holds at a time than the forward does."""


def tiled_gradients(
    problem: Problem, grads: ResultGradients, needed: Collection[str], scores: int = CACHE_SCORES
) -> dict[str, Tensor]:
    """Gradients of the learned tensors named in `needed`, as `Problem.learned` names them, in their own dtypes.

    Args:
        problem: what the forward computed.
        grads: what reaches its results.
        needed: which gradients to compute.
        scores: how many entries of the pattern the forward may hold at one time; a backward holds fewer.
    """
    learned = problem.learned()
    totals = {name: torch.zeros_like(learned[name], dtype=problem.dtype) for name in needed}
    if all(grad is None for grad in grads):
        return {name: totals[name].to(learned[name].dtype) for name in needed}
    strips = plan_strips(problem, scores=max(1, scores // BUFFERS))
    own = [{name: torch.zeros_like(totals[name]) for name in needed if name in SHARED} for _ in strips]
    number = {id(strip): place for place, strip in enumerate(strips)}

    def run(strip: list[Tile], work: Workspace) -> None:
        sums = totals | own[number[id(strip)]]
        for tile in strip:
            _add_tile(problem, tile, grads, sums)

    bias = problem.bias if "bias" in needed else None
    if bias is not None and tuple(bias.shape[:2]) != (problem.batch, problem.heads):
        # Strips add to the same entries of a bias that heads share, and it may be as large as the pattern.
        for strip in strips:
            run(strip, Workspace(problem))
    else:
        run_strips(run, strips, problem)
    for sums in own:
        for name, part in sums.items():
            totals[name] += part
    return {name: totals[name].to(learned[name].dtype) for name in needed}


def _add_tile(problem: Problem, tile: Tile, grads: ResultGradients, totals: dict[str, Tensor]) -> None:
    """Recompute one tile and add its gradients to the totals."""
    block = problem.cut(*tile)
    h = slice(tile.n.start * block.group, tile.n.stop * block.group)
    own = ResultGradients(*(None if g is None else g[tile.b, h, tile.i].to(problem.dtype) for g in grads))
    for name, gradient in _tile_gradients(block, own, totals).items():
        total = totals[name]
        place = total[_place(name, tile, h, total)]
        place += gradient.sum_to_size(place.shape)


def _tile_gradients(block: Problem, grads: ResultGradients, needed: Collection[str]) -> dict[str, Tensor]:
    weights, d_logits, d_sink = _logit_gradients(block, grads)
    b, n, i, j, rows = block.batch, block.key_heads, block.queries, block.keys, block.group * block.queries
    found: dict[str, Tensor] = {}
    if grads.out is not None and "v" in needed:
        found["v"] = weights.view(b, n, rows, j).mT @ grads.out.reshape(b, n, rows, -1)
    if grads.key_probes is not None and "key_probes" in needed:
        found["key_probes"] = weights.mT @ grads.key_probes
    if d_sink is not None and "sinks" in needed:
        found["sinks"] = d_sink.sum((0, 2))
    d_scores, d_bias = d_logits
    if "q" in needed or "k" in needed:
        ds = d_scores.reshape(b, n, rows, j)
        if "q" in needed:
            found["q"] = (ds @ block.k.to(block.dtype)).view(b, n * block.group, i, -1) * block.scale
        if "k" in needed:
            found["k"] = ds.mT @ block.q.to(block.dtype).reshape(b, n, rows, -1) * block.scale
    if "bias" in needed:
        found["bias"] = d_bias
    if "sigmoid_bias" in needed:
        found["sigmoid_bias"] = d_bias.sum((0, 2, 3))
    if "alibi" in needed:
        found["alibi"] = -(d_bias.sum(0) * block.distances().abs().to(block.dtype)).sum((1, 2))
    if "relative_bias" in needed and block.relative_bias is not None:
        found["relative_bias"] = _bucket_sums(block, d_bias.sum(0))
    return found


def _logit_gradients(block: Problem, grads: ResultGradients) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor | None]:
    """The pattern A of a tile, the gradients of its scores and of its biases, and that of its learned sinks."""
    s, d_score, d_bias = _logits(block)
    visible = block.visible()
    if visible is not None:
        s = s.masked_fill_(~visible, -math.inf)
    sink = None if block.sinks is None else block.sinks.to(block.dtype)[:, None, None]
    top = s.amax(-1, keepdim=True) if block.keys else s.new_full((*s.shape[:3], 1), -math.inf)
    top = top if sink is None else torch.maximum(top, sink)
    t = s - torch.where(top == -math.inf, 0, top)
    p = torch.exp(t)
    total = p.sum(-1, keepdim=True)
    if sink is not None:
        t_sink = torch.where(top == -math.inf, -math.inf, sink - top)
        total = total + torch.exp(t_sink)
    total = torch.where(total == 0, 1, total)
    log_total = torch.log(total)
    p = p.div_(total)
    t = t.sub_(log_total).masked_fill_(p == 0, 0)
    weights = torch.exp(s) if block.normalizer == "sigmoid" else p
    dp = torch.zeros_like(s)
    if grads.out is not None:
        b, n, rows = block.batch, block.key_heads, block.group * block.queries
        dp = (grads.out.reshape(b, n, rows, -1) @ block.v.to(block.dtype).mT).view(s.shape)
    if grads.key_probes is not None and block.key_probes is not None:
        dp = dp + grads.key_probes @ block.key_probes.mT
    centre = torch.zeros_like(total)
    if block.normalizer == "softmax":
        centre = (p * dp).sum(-1, keepdim=True)
    if grads.lse is not None:
        centre = centre - grads.lse[..., None]
    d_entropy = None if grads.entropy is None else grads.entropy[..., None]
    if d_entropy is not None:
        entropy = -(p * t).sum(-1, keepdim=True)
    d_sink: Tensor | None = None
    if sink is not None:
        t_sink = t_sink - log_total
        p_sink = torch.exp(t_sink)
        t_sink = torch.where(p_sink == 0, 0, t_sink)
        if d_entropy is not None:
            entropy = entropy - p_sink * t_sink
    inner = -centre
    if d_entropy is not None:
        inner = inner - d_entropy * entropy
    if sink is not None:
        d_sink = p_sink * (inner if d_entropy is None else inner - d_entropy * t_sink)
        d_sink = d_sink.squeeze(-1)
    inner = inner.expand(s.shape) if d_entropy is None else t.mul_(-d_entropy).add_(inner)
    ds = p * inner + weights * dp if block.normalizer == "sigmoid" else p * (inner + dp)
    # A row that sees no key may be given a gradient of its lse of -inf that is no number.
    ds = ds.masked_fill_(s == -math.inf, 0)
    ds = ds if d_bias is None else ds.mul_(d_bias)
    return weights, (ds if d_score is None else ds * d_score, ds), d_sink


def _logits(block: Problem) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`Problem.logits`, with the derivatives that the cap gives the scores, and the sigmoid normaliser all of it."""
    s = block.scores()
    d_score: Tensor | None = None
    d_bias: Tensor | None = None
    if block.softcap is not None:
        s = s.div_(block.softcap).tanh_()
        d_score = 1 - s.square()
        s = s.mul_(block.softcap)
    bias = block.position_bias()
    if bias is not None:
        s = s.add_(bias)
    if block.normalizer == "sigmoid":
        if block.sigmoid_bias is not None:
            s = s.add_(block.sigmoid_bias.to(block.dtype)[:, None, None])
        d_bias = torch.sigmoid(-s)
        s = logsigmoid(s)
    return s, d_score, d_bias


def _bucket_sums(block: Problem, d_bias: Tensor) -> Tensor:
    """[buckets, h] from [h, i, j]: sums along diagonals first, then over the diagonals of a bucket."""
    assert block.relative_bias is not None
    table, bidirectional, max_distance = block.relative_bias
    h, i, j = d_bias.shape
    # Each row moved right by its place from the end, so that diagonals stand in columns.
    skewed = pad(d_bias.flip(-2), (0, i)).reshape(h, -1)[:, : i * (j + i - 1)].view(h, i, j + i - 1)
    diagonals = skewed.sum(-2)
    start = -(i - 1) - block.offset
    distances = torch.arange(start, start + i + j - 1, device=d_bias.device)
    buckets = relative_buckets(distances, table.shape[0], bidirectional, max_distance)
    return (diagonals @ one_hot(buckets, table.shape[0]).to(d_bias.dtype)).T


def _place(name: str, tile: Tile, h: slice, total: Tensor) -> tuple[slice, ...]:
    """Where a tile's part of a learned tensor lies; the whole of a dimension that broadcasts."""
    every = slice(None)
    if name in ("alibi", "sinks", "sigmoid_bias"):
        return (h,)
    if name == "relative_bias":
        return (every, h)
    if name == "q":
        return (tile.b, h, tile.i)
    if name in ("k", "v"):
        return (tile.b, tile.n, tile.j)
    index = (tile.b, h, tile.i, tile.j) if name == "bias" else (tile.b, h)
    broadcast = tuple(at if size > 1 else every for at, size in zip(index, total.shape, strict=False))
    return (*broadcast, tile.j) if name == "key_probes" else broadcast

"""Backend `tiled`: plain torch over blocks of queries, memory that grows as N, every option and every statistic.

Gradients recompute the pattern tile by tile, as FlashAttention does (arXiv 2205.14135), and reach q, k, v, the probes,
biases and their tables, slopes and sinks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnlab_kernels.dense import Pattern
from attnlab_kernels.emit import Emitted
from attnlab_kernels.precision import without_autocast
from attnlab_kernels.problem import Problem
from attnlab_kernels.request import Request
from attnlab_kernels.rows import Workspace, in_compute_precision, softmax_rows
from attnlab_kernels.statistics import Collector
from attnlab_kernels.strips import run_strips
from attnlab_kernels.tiles import CACHE_SCORES, Tile, plan_strips

DIFFERENTIABLE = ("lse", "entropy", "key_probes")
"""Statistics that carry gradients, beside the output."""


def tiled_attention(problem: Problem, request: Request, scores: int = CACHE_SCORES) -> tuple[Tensor, Emitted]:
    """Output [B, Hq, Nq, Dv] in q's dtype and the statistics in float32, or in float64 from float64 inputs.

    Args:
        problem: what to compute.
        request: the statistics asked for.
        scores: how many entries of the pattern may exist at one time.
    """
    learned = problem.learned()
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in learned.values())):
        with torch.no_grad():
            return _forward(problem, request, scores)
    # Only what carries gradients passes through autograd; the rest comes back on the side.
    side: list[Emitted] = []
    out, *carried = _Tiled.apply(problem, request, scores, side, *learned.values())
    return out, replace(side[0], **dict(zip(DIFFERENTIABLE, carried, strict=True)))


def _forward(problem: Problem, request: Request, scores: int) -> tuple[Tensor, Emitted]:
    problem = in_compute_precision(problem)
    emit = request.emit
    collector = Collector(problem, request)

    def run(strip: list[Tile], work: Workspace) -> None:
        for tile in strip:
            block = problem.cut(*tile)
            if block.key_mask is not None and bool(block.key_mask.all()):
                block = replace(block, key_mask=None)
            collector.add(tile, block, softmax_rows(block, work, emit.entropy, emit.argmax), work)

    run_strips(run, plan_strips(problem, all_heads=emit.head_gram, scores=scores), problem)
    return collector.finish()


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, problem: Problem, request: Request, scores: int, side: list[Emitted], *learned: Tensor
    ) -> tuple[Any, ...]:
        ctx.problem, ctx.scores, ctx.names = problem, scores, list(problem.learned())
        ctx.save_for_backward(*learned)
        ctx.set_materialize_grads(False)
        out, emitted = _forward(problem, request, scores)
        side.append(emitted)
        return (out, *(getattr(emitted, name) for name in DIFFERENTIABLE))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *wanted: Tensor | None) -> tuple[Tensor | None, ...]:
        learned = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        problem = ctx.problem.with_learned({name: tensor.detach() for name, tensor in learned.items()})
        needed = [name for name, need in zip(ctx.names, ctx.needs_input_grad[4:], strict=True) if need]
        totals = {name: torch.zeros_like(learned[name], dtype=problem.dtype) for name in needed}
        with without_autocast(problem.q):
            for strip in plan_strips(problem, scores=max(1, ctx.scores // 4)):
                for tile in strip:
                    _add_gradients(problem, tile, wanted, totals)
        grads = [totals[name].to(learned[name].dtype) if name in totals else None for name in ctx.names]
        return (None, None, None, None, *grads)


def _add_gradients(problem: Problem, tile: Tile, wanted: tuple[Tensor | None, ...], totals: dict[str, Tensor]) -> None:
    """Recompute one tile with gradients on, and add what comes back to the totals."""
    block = problem.cut(*tile)
    h = slice(tile.n.start * block.group, tile.n.stop * block.group)
    with torch.enable_grad():
        leaves = {name: tensor.to(problem.dtype).requires_grad_() for name, tensor in block.learned().items()}
        block = block.with_learned(leaves)
        pattern = Pattern(block)
        probes = None if block.key_probes is None else pattern.weights @ block.key_probes
        results = (pattern.read(block.v), pattern.lse, pattern.entropy(), probes)
    pairs = [
        (result, grad[tile.b, h, tile.i].to(result.dtype))
        for result, grad in zip(results, wanted, strict=True)
        if result is not None and grad is not None
    ]
    inputs = [leaves[name] for name in totals]
    if not pairs:
        return
    grads = torch.autograd.grad([r for r, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
    for (name, total), grad in zip(totals.items(), grads, strict=True):
        if grad is not None:
            total[_place(name, tile, h, total)] += grad


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

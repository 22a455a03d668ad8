"""Gradient products, backend `tiled`: plain torch over tiles of whole rows, memory that grows as N.

A tile's rows have all their keys, so A, and what a row loses with its largest entry, are known at once.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from attnlab_kernels.hidden import without_idle_masks
from attnlab_kernels.problem import Problem, cut_broadcast
from attnlab_kernels.product_request import GradientProducts, ProductRequest
from attnlab_kernels.rows import Asked, softmax_parts, spans
from attnlab_kernels.statistics import add_block_sums
from attnlab_kernels.strips import prepared, run_strips
from attnlab_kernels.tiles import CACHE_SCORES, Tile, plan_strips, without_gap
from attnlab_kernels.workspace import Workspace


def tiled_products(
    problem: Problem, grad_out: Tensor, request: ProductRequest, scores: int = CACHE_SCORES
) -> GradientProducts:
    """Everything asked for, in a fixed order of sums.

    Args:
        problem: whose pattern is read.
        grad_out: [B, Hq, Nq, Dv].
        request: what to compute.
        scores: how many entries of the pattern may exist at one time.
    """
    problem = prepared(problem)
    b, h, n_q, n_k = problem.batch, problem.heads, problem.queries, problem.keys

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(b, h, *shape, dtype=problem.dtype, device=problem.q.device)

    sums = [zeros(-(-n_q // size), -(-n_k // size)) for size in request.pools]
    counts = [torch.zeros_like(total) for total in sums]
    right = None if request.right is None else zeros(n_q, request.right.shape[-1])
    left = None if request.left is None else zeros(n_k, request.left.shape[-1])

    def run(strip: list[Tile], work: Workspace) -> None:
        work.begin()
        for tile in strip:
            parts = without_gap(problem, tile)
            blocks = [without_idle_masks(problem.cut(*part)) for part in parts]
            heads = slice(tile.n.start * problem.group, tile.n.stop * problem.group)
            f = _entries(blocks, grad_out[tile.b, heads, tile.i], request.function == "loss_change", work)
            if right is not None:
                for at, part in zip(spans(blocks), parts, strict=True):
                    right[tile.b, heads, tile.i] += f[..., at] @ _columns(request.right, tile.b, heads, part.j)
            if problem.query_mask is not None:
                f.masked_fill_(~problem.query_mask[tile.b, None, tile.i, None], 0)
            for at, part, block in zip(spans(blocks), parts, blocks, strict=True):
                if left is not None:
                    columns = _columns(request.left, tile.b, heads, tile.i)
                    left[tile.b, heads, part.j] += f[..., at].mT @ columns
                if sums:
                    counted = block.visible_float()
                    ones = torch.ones_like(counted[..., :1])
                    for size, total, count in zip(request.pools, sums, counts, strict=True):
                        add_block_sums(total[tile.b, heads], size, part, f[..., at], ones)
                        add_block_sums(count[tile.b, heads], size, part, counted, ones)

    run_strips(run, plan_strips(problem, scores=scores, gaps=True), problem)
    means = [total / count.clamp(min=1) for total, count in zip(sums, counts, strict=True)]
    return request.answer(means, counts, right, left)


def _columns(x: Tensor | None, b: slice, h: slice, n: slice) -> Tensor:
    """The rows `n` of what [b or 1, h or 1, N, G] holds for a tile."""
    cut = None if x is None else cut_broadcast(x[:, :, n], (b, h))
    assert cut is not None
    return cut


def _entries(blocks: list[Problem], grad_out: Tensor, removal: bool, work: Workspace) -> Tensor:
    """[b, h, i, j], f of a tile, in a buffer; blocks that hold the same queries stand side by side in the rows."""
    b, h, n_q, n_k = *grad_out.shape[:3], sum(block.keys for block in blocks)
    gradient = work.take("gradient", b, h, n_q, n_k)
    for at, block in zip(spans(blocks), blocks, strict=True):
        key_heads, rows, dv = b * block.key_heads, block.group * n_q, block.v.shape[-1]
        torch.bmm(
            grad_out.to(block.dtype).reshape(key_heads, rows, dv),
            block.v.reshape(key_heads, block.keys, dv).mT,
            out=gradient[..., at].view(key_heads, rows, block.keys),
        )
    if removal and n_k:
        return _loss_change(blocks, gradient, work)
    near_shares, found = softmax_parts(blocks, work, Asked())
    return gradient.mul_(near_shares).mul_(found.to_weights).relu_()


def _loss_change(blocks: list[Problem], gradient: Tensor, work: Workspace) -> Tensor:
    """-A (G - sum A G) / (1 - A), written over G.

    Near A = 1, which only a row's largest entry comes near, 1 - A loses its digits: that entry is compared with the
    mean of G over the others, whose sums are taken without it.
    """
    near_shares, found = softmax_parts(blocks, work, Asked(argmax=True))
    weights = torch.mul(near_shares, found.to_weights, out=work.take("weights", *gradient.shape))
    assert found.argmax is not None
    place = found.argmax.clamp(min=0)[..., None]
    largest, its_gradient = weights.gather(-1, place), gradient.gather(-1, place)
    others = weights.scatter_(-1, place, 0)
    share, read = others.sum(-1, keepdim=True), torch.linalg.vecdot(others, gradient)[..., None]
    if blocks[0].sinks is not None:
        share += torch.exp(blocks[0].sinks.to(share.dtype)[:, None] - found.lse)[..., None]
    lost = (share < torch.finfo(share.dtype).tiny / torch.finfo(share.dtype).eps) & (largest > 0)
    if bool(lost.any()):
        mean = _mean_of_others(blocks, place, gradient, work)
    else:
        mean = torch.where(largest > 0, read / share, 0)
    change = largest * (mean - its_gradient)
    gradient.sub_(read + largest * its_gradient).mul_(others).div_(others.sub_(1))
    return gradient.scatter_(-1, place, change)


def _mean_of_others(blocks: list[Problem], largest: Tensor, gradient: Tensor, work: Workspace) -> Tensor:
    """[b, h, i, 1], the mean of G without the largest entries, by a softmax of its own: the others may underflow.

    The largest entry's own G where there is no other, so that removing it changes nothing.
    """
    visible = torch.ones_like(gradient, dtype=torch.bool).scatter_(-1, largest, False)
    masked = [_masked(block, visible[..., at]) for at, block in zip(spans(blocks), blocks, strict=True)]
    near_shares, found = softmax_parts(masked, work, Asked())
    mean = torch.linalg.vecdot(near_shares, gradient)[..., None] * found.to_weights
    return torch.where(found.lse[..., None] == -math.inf, gradient.gather(-1, largest), mean)


def _masked(block: Problem, visible: Tensor) -> Problem:
    return replace(block, mask=visible if block.mask is None else visible & block.mask)

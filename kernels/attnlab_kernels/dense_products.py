"""Gradient products, backend `dense`: forms A and G and multiplies. The oracle, in any precision up to float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnlab_kernels.dense import Pattern, block_sums
from attnlab_kernels.problem import Problem
from attnlab_kernels.product_request import GradientProducts, ProductRequest


def dense_products(problem: Problem, grad_out: Tensor, request: ProductRequest) -> GradientProducts:
    """Everything asked for, read off the whole matrix f."""
    pattern = Pattern(problem)
    values = problem.v.to(problem.dtype).repeat_interleave(problem.group, dim=1)
    gradient = grad_out.to(problem.dtype) @ values.mT
    if request.function == "relevance":
        entries = torch.relu(pattern.weights * gradient)
    else:
        entries = loss_change(pattern, gradient, problem.sinks)
    read = torch.where(pattern.counts, entries, 0)
    counted = (pattern.seen & pattern.counts).to(problem.dtype)
    counts = [block_sums(counted, size) for size in request.pools]
    return request.answer(
        [block_sums(read, size) / count.clamp(min=1) for size, count in zip(request.pools, counts, strict=True)],
        counts,
        None if request.right is None else entries @ request.right,
        None if request.left is None else read.mT @ request.left,
    )


def loss_change(pattern: Pattern, gradient: Tensor, sinks: Tensor | None) -> Tensor:
    """[b, h, i, j], -A (G - sum A G) / (1 - A), to first order what the loss gains when the entry is removed.

    1 - A loses its digits near A = 1, which only a row's largest entry comes near: without that, the row's output is
    the mean over the softmax of the other entries. An entry that is all its row has changes nothing.
    """
    weights = pattern.weights
    if not weights.shape[-1]:
        return weights
    change = weights * (gradient - (weights * gradient).sum(-1, keepdim=True)) / (weights - 1)
    largest = pattern.logits.argmax(-1, keepdim=True) == torch.arange(weights.shape[-1], device=weights.device)
    others = torch.where(largest, -math.inf, pattern.logits)
    lse = others.logsumexp(-1, keepdim=True)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None, None])
    alone = lse == -math.inf
    mean = (torch.exp(others - torch.where(alone, 0, lse)) * gradient).sum(-1, keepdim=True)
    return torch.where(largest, torch.where(alone, 0, weights * (mean - gradient)), change)

"""`gradient_products`: block means of, and vectors through, functions of the pattern and the loss's gradient to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from attnlab_kernels.backends import choose_backend
from attnlab_kernels.dense_products import dense_products
from attnlab_kernels.options import Options
from attnlab_kernels.precision import on_device_of, without_autocast
from attnlab_kernels.product_request import Function, GradientProducts, resolve_products
from attnlab_kernels.resolve import resolve_problem
from attnlab_kernels.tiled_products import tiled_products


def gradient_products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    *,
    function: Function = "relevance",
    pool: int | Sequence[int] | None = None,
    right: Tensor | None = None,
    left: Tensor | None = None,
    backend: str = "auto",
    **options: Unpack[Options],
) -> GradientProducts:
    """Products of f(A, G), where A is the pattern and G_ij = dO_i . v_j the loss's gradient to it, without forming f.

    "relevance": f = max(A G, 0), of Chefer et al.'s generic attention explainability (arXiv 2103.15679). For one target
    its map is a vector that is pushed through the layers, r += x^T f or f x, so no matrix is needed.

    "loss_change": f = -A_ij (G_ij - sum_n G_in A_in) / (1 - A_ij), of MoA (arXiv 2406.14909), which averages it over
    blocks of 64: to first order what the loss gains when A_ij is removed and the row renormalised, a learned sink
    staying in it. An entry that is all its row has leaves nothing to renormalise: 0. Near A = 1 the quotient loses its
    digits, so a row's largest entry is compared with the mean over its other entries instead, which keeps them.

    No gradients flow through the result.

    Args:
        q, k, v: as in `attention`.
        grad_out: [B, Hq, Nq, Dv], dO, the loss's gradient to attention's output, in q's dtype.
        function: which f. Under `normalizer="sigmoid"` "relevance" takes A as it is; "loss_change" does not exist.
        pool: block size b of a map of means of f over visible entries of queries that count; a sequence for several.
        right: x [Nk, G], [B, Nk, G] or [B, Hq, Nk, G], for f x.
        left: x [Nq, G], [B, Nq, G] or [B, Hq, Nq, G], for x^T f over queries that count.
        backend: as in `attention`.
        options: the options of `attention`.

    Raises:
        ValueError: an argument that does not fit, or nothing asked for.
        UnsupportedError: the backend named cannot do this call.

    Example:
        >>> from attnlab_kernels import attention
        >>> q, k, v = torch.randn(3, 1, 2, 6, 8, requires_grad=True)
        >>> out = attention(q, k, v, causal=True).out
        >>> (grad_out,) = torch.autograd.grad(out.square().sum(), out)
        >>> found = gradient_products(q, k, v, grad_out, function="loss_change", pool=3, causal=True)
        >>> found.pooled.shape, found.pooled_count[0, 0].tolist()
        (torch.Size([1, 2, 2, 2]), [[6.0, 0.0], [9.0, 6.0]])
        >>> everyone = torch.ones(6, 1)
        >>> gradient_products(q, k, v, grad_out, left=everyone, causal=True).left.shape  # relevance of each key
        torch.Size([1, 2, 6, 1])
    """
    problem = resolve_problem(q, k, v, **options)
    request = resolve_products(problem, grad_out, function, pool, right, left)
    chosen = choose_backend(backend, problem)
    with torch.no_grad(), without_autocast(q), on_device_of(q):
        if chosen == "dense":
            return dense_products(problem, grad_out, request)
        if chosen == "tiled":
            return tiled_products(problem, grad_out, request)
        from attnlab_kernels.gpu.launch_products import run_products

        return run_products(problem, grad_out, request)

"""`attention`: exact attention and its statistics, one signature over every backend."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from attnlab_kernels.backends import BACKENDS
from attnlab_kernels.dense import dense_attention
from attnlab_kernels.emit import Emit, Emitted
from attnlab_kernels.precision import without_autocast
from attnlab_kernels.problem import RelativeBias
from attnlab_kernels.request import resolve_request
from attnlab_kernels.resolve import resolve_problem


class Attention(NamedTuple):
    """The output [B, Hq, Nq, Dv] in q's dtype, and the statistics asked for."""

    out: Tensor
    emitted: Emitted


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    query_offset: int | None = None,
    window: int | None = None,
    first_tokens: int = 0,
    prefix: Tensor | None = None,
    segments: Tensor | tuple[Tensor, Tensor] | None = None,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi: Tensor | None = None,
    relative_bias: RelativeBias | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    normalizer: str = "softmax",
    sigmoid_bias: float | Tensor | None = None,
    dropout_p: float = 0.0,
    emit: Emit | None = None,
    backend: str = "auto",
) -> Attention:
    """Exact attention that emits statistics of its pattern A without forming it (`dense` apart).

    A = softmax(S) over the visible keys, S = cap(scale * q . k) + biases. Gradients flow through the output, `lse`,
    `entropy` and `key_probes`, to q, k, v, the probes, biases and their tables, and sinks; other statistics carry none.

    Args:
        q: [B, Hq, Nq, D], floating point; half precision is computed in float32.
        k: [B, Hkv, Nk, D]; Hq is a multiple of Hkv, query head h reads key head h // (Hq // Hkv).
        v: [B, Hkv, Nk, Dv]. D and Dv are at most 256.
        scale: factor on q . k; 1 / sqrt(D) by default.
        causal: key j is visible to query i when j <= i + query_offset.
        query_offset: position of query 0 among the keys; Nk - Nq by default, which aligns the ends as in a KV cache.
        window: keys with |i + query_offset - j| >= window are hidden; one-sided when causal.
        first_tokens: the first keys stay visible whatever the window (causality still holds).
        prefix: [B]; keys before it are visible to every query, whatever causality and window.
        segments: ids [B, N], or a pair [B, Nq], [B, Nk]; only equal ids see each other.
        key_mask: [B, Nk] boolean; False keys do not exist.
        query_mask: [B, Nq] boolean; False rows get their output, but count as readers in no statistic over queries.
        mask: boolean that broadcasts to [B, Hq, Nq, Nk], True where visible. It is the caller's N x N.
        bias: added to the logits; broadcasts to [B, Hq, Nq, Nk]. -inf hides the entry.
        alibi: slopes [Hq] (arXiv 2108.12409); -slope * |i + query_offset - j| is added.
        relative_bias: T5's bucket table, see `RelativeBias`.
        softcap: c * tanh(s / c) of the scaled scores, before any bias.
        sinks: [Hq], a learned logit a head without a value (gpt-oss).
        normalizer: "softmax", or "sigmoid" (arXiv 2409.04431): A = sigmoid(S + sigmoid_bias), rows not normalised.
        sigmoid_bias: a number or [Hq]; 0 by default.
        dropout_p: 0, which is all that is supported.
        emit: the statistics wanted; none by default.
        backend: "triton", "tiled", "dense", or "auto": triton on a GPU where it supports all that is asked, else tiled.

    Returns:
        `(out, emitted)`. Natural logarithms throughout. A row that sees no key has output 0, lse -inf and entropy 0.

    Raises:
        ValueError: an argument that does not fit, with what was given and what was expected.
        UnsupportedError: the backend named does not have an option or a statistic.

    Example:
        >>> import torch
        >>> q, k, v = torch.zeros(3, 1, 2, 4, 8)
        >>> out, emitted = attention(q, k, v, causal=True, emit=Emit(entropy=True, key_sum=True))
        >>> emitted.entropy[0, 0].exp().round(decimals=3)
        tensor([1., 2., 3., 4.])
        >>> round(float(emitted.key_sum[0, 0].sum()), 4)
        4.0
    """
    if dropout_p != 0:
        raise ValueError(
            f"dropout_p is {dropout_p}; expected 0: statistics of a randomly thinned pattern are not the model's. "
            "Call model.eval(), or set its attention dropout to 0."
        )
    problem = resolve_problem(
        q,
        k,
        v,
        scale=scale,
        causal=causal,
        query_offset=query_offset,
        window=window,
        first_tokens=first_tokens,
        prefix=prefix,
        segments=segments,
        key_mask=key_mask,
        query_mask=query_mask,
        mask=mask,
        bias=bias,
        alibi=alibi,
        relative_bias=relative_bias,
        softcap=softcap,
        sinks=sinks,
        normalizer=normalizer,
        sigmoid_bias=sigmoid_bias,
    )
    problem, request = resolve_request(Emit() if emit is None else emit, problem)
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}.")
    if backend == "dense":
        with without_autocast(q):
            return Attention(*dense_attention(problem, request))
    # Imported here, since it registers operators of torch, which an import of this package does not.
    from attnlab_kernels.operator import compute

    return Attention(*compute(problem, request, backend))

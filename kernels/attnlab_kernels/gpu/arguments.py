"""What every kernel reads of a problem, as named tuples: an option that is absent is None, which compiles out.

Tensors travel with their strides, so almost nothing is made contiguous; a stride of 0 broadcasts. Switches and sizes
that shape the code are constexpr, so each combination is a kernel of its own.

Letters: b batch, h query heads, n keys' heads or positions, d columns.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnlab_kernels.problem import Problem, relative_buckets

LOG2E = math.log2(math.e)

LARGEST_TILE = 256
"""Rows and columns of a tile at most."""


class Strided(NamedTuple):
    """A [b, h, n, d] tensor: where it begins, and its strides in elements."""

    p: Any
    b: Any
    h: Any
    n: Any
    d: Any


class Relative(NamedTuple):
    """T5's bias by distance: `biases` [h, 2 reach + 1] of j - i - offset from -reach to reach, beyond which it is flat.

    `buckets` [2 reach + 1] says which row of the table each distance reads, for the gradient.
    """

    biases: Any
    buckets: Any
    reach: Any


class Inputs(NamedTuple):
    """A `Problem` as kernels read it.

    Attributes:
        q, k, v, f: [b, h, i, d], [b, n, j, d], [b, n, j, dv], and key probes [b, h, j, g] in float32.
        heads, queries, keys, offset: sizes, and the position of query 0 among the keys.
        group, d, dv, g: query heads of a key head, columns; constexpr.
        c: exponents are powers of two of `c * s`, where `s` is what `logits` gives.
        scale, softcap, bias, alibi, relative, sigmoid, sigmoid_bias: how a product q . k becomes a logit.
        raw: constexpr; nothing but a positive scale does, so `s` is the product itself and `c` holds the scale.
        window, first_tokens, prefix [b], query_segments [b, i], key_segments [b, j], key_mask [b, j],
        mask [b, h, i, j], causal: what is visible. Booleans are bytes; `causal` is constexpr, and last for the reason
        that `Above` gives.
        query_mask: [b, i]; which queries count as readers.
        sinks: [h], learned logits.
    """

    q: Any
    k: Any
    v: Any
    f: Any
    heads: Any
    queries: Any
    keys: Any
    offset: Any
    group: Any
    d: Any
    dv: Any
    g: Any
    c: Any
    scale: Any
    raw: Any
    softcap: Any
    bias: Any
    alibi: Any
    relative: Any
    sigmoid: Any
    sigmoid_bias: Any
    window: Any
    first_tokens: Any
    prefix: Any
    query_segments: Any
    key_segments: Any
    key_mask: Any
    mask: Any
    query_mask: Any
    sinks: Any
    causal: Any


def strided(tensor: Tensor | None, *shape: int) -> Strided | None:
    """A tensor that broadcasts to a four-dimensional shape, to be read in tiles of rows.

    It is not copied unless its rows or columns lie so far apart that offsets inside a tile would not fit 32 bits.
    """
    if tensor is None:
        return None
    full = tensor.expand(shape)
    if LARGEST_TILE * (full.stride(2) + full.stride(3)) >= 2**31:
        full = full.contiguous()
    return Strided(full, *full.stride())


def _entries(tensor: Tensor | None, *shape: int) -> Strided | None:
    """A tensor with a number for each entry of the pattern, whose offsets have 64 bits throughout."""
    if tensor is None:
        return None
    full = tensor.expand(shape)
    if full.stride(2) >= 2**32:
        # Kernels multiply a row's number by 32 bits of stride.
        full = full.contiguous()
    return Strided(full, *full.stride())


def kernel_inputs(problem: Problem) -> Inputs:
    """The problem as kernels read it. Small tables are converted to float32 on the way; q, k, v are not copied."""
    b, h, n_q, n_k = problem.batch, problem.heads, problem.queries, problem.keys
    probes = problem.key_probes
    changed = (problem.softcap, problem.bias, problem.alibi, problem.relative_bias)
    sigmoid = problem.normalizer == "sigmoid"
    raw = not sigmoid and problem.scale > 0 and all(option is None for option in changed)
    return Inputs(
        q=strided(problem.q, *problem.q.shape),
        k=strided(problem.k, *problem.k.shape),
        v=strided(problem.v, *problem.v.shape),
        f=None if probes is None else strided(probes.float(), b, h, n_k, probes.shape[-1]),
        heads=h,
        queries=n_q,
        keys=n_k,
        offset=problem.offset,
        group=tl.constexpr(problem.group),
        d=tl.constexpr(problem.q.shape[-1]),
        dv=tl.constexpr(problem.v.shape[-1]),
        g=tl.constexpr(0 if probes is None else probes.shape[-1]),
        c=float(problem.scale * LOG2E if raw else LOG2E),
        scale=float(problem.scale),
        raw=tl.constexpr(raw),
        softcap=None if problem.softcap is None else float(problem.softcap),
        bias=_entries(problem.bias, b, h, n_q, n_k),
        alibi=_vector(problem.alibi),
        relative=_relative(problem),
        sigmoid=tl.constexpr(sigmoid),
        sigmoid_bias=_vector(problem.sigmoid_bias),
        window=problem.window,
        first_tokens=problem.first_tokens if problem.window is not None and problem.first_tokens > 0 else None,
        prefix=None if problem.prefix is None else problem.prefix.contiguous(),
        query_segments=None if problem.query_segments is None else problem.query_segments.contiguous(),
        key_segments=None if problem.key_segments is None else problem.key_segments.contiguous(),
        key_mask=_bytes(problem.key_mask),
        mask=None if problem.mask is None else _entries(problem.mask.view(torch.uint8), b, h, n_q, n_k),
        query_mask=_bytes(problem.query_mask),
        sinks=_vector(problem.sinks),
        causal=tl.constexpr(problem.causal),
    )


def padded(columns: int) -> int:
    """Columns of a tile: a power of two of at least 16, which the matrix units want."""
    return max(16, int(triton.next_power_of_2(columns)))


def _vector(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float().contiguous()


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _relative(problem: Problem) -> Relative | None:
    if problem.relative_bias is None:
        return None
    table, bidirectional, reach = problem.relative_bias
    distances = torch.arange(-reach, reach + 1, device=table.device)
    buckets = relative_buckets(distances, table.shape[0], bidirectional, reach)
    return Relative(table.detach().float()[buckets].T.contiguous(), buckets.int(), reach)

"""Turns the arguments of `attention` into a `Problem`, or says in one sentence which argument does not fit."""

from __future__ import annotations

import math
from operator import index
from typing import TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from attnlab_kernels.problem import Problem, RelativeBias

MAX_HEAD_DIM = 256
LONGEST_WINDOW = 2**30
FARTHEST_OFFSET = 2**30
Whole = TypeVar("Whole", int, int | None)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def resolve_problem(
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
) -> Problem:
    """Check every argument and fill in the defaults.

    Raises:
        ValueError: what was given and what was expected.
    """
    _check_qkv(q, k, v)
    b, h, n_q, d = q.shape
    n_k = k.shape[2]
    window, query_offset = check_whole("window", window), check_whole("query_offset", query_offset)
    first_tokens = check_whole("first_tokens", first_tokens)
    if scale is not None and not torch.compiler.is_compiling() and not math.isfinite(float(scale)):
        raise ValueError(f"scale is {scale}; expected a finite number.")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; expected at least 1, or None for no window.")
    if isinstance(query_offset, int) and abs(query_offset) > FARTHEST_OFFSET:
        raise ValueError(f"query_offset is {query_offset}; expected at most {FARTHEST_OFFSET} either way.")
    if window is not None and window > LONGEST_WINDOW:
        # Some give the largest integer there is for none; positions beside it would overflow.
        window = LONGEST_WINDOW
    if first_tokens < 0:
        raise ValueError(f"first_tokens is {first_tokens}; expected 0 or more.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; expected a positive number, or None for no cap.")
    if normalizer not in ("softmax", "sigmoid"):
        raise ValueError(f"normalizer is {normalizer!r}; expected 'softmax' or 'sigmoid'.")
    if normalizer == "sigmoid" and sinks is not None:
        raise ValueError("sinks are a logit of the softmax; leave them out with normalizer='sigmoid'.")
    if normalizer == "softmax" and sigmoid_bias is not None:
        raise ValueError("sigmoid_bias is given with normalizer='softmax'; expected normalizer='sigmoid'.")
    query_segments, key_segments = _segments(segments, b, n_q, n_k)
    _check_shape("prefix", prefix, (b,))
    if prefix is not None and (prefix.is_floating_point() or prefix.dtype == torch.bool):
        raise ValueError(f"prefix has dtype {prefix.dtype}; expected whole numbers of keys.")
    _check_boolean("key_mask", key_mask, (b, n_k))
    _check_boolean("query_mask", query_mask, (b, n_q))
    if isinstance(sigmoid_bias, (int, float)):
        sigmoid_bias = torch.full((h,), float(sigmoid_bias), dtype=torch.float64, device=q.device)
    for name, vector in (("alibi", alibi), ("sinks", sinks), ("sigmoid_bias", sigmoid_bias)):
        _check_shape(name, vector, (h,))
        _check_float(name, vector)
    _check_float("bias", bias)
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}; expected torch.bool, True where the key is visible.")
    if relative_bias is not None:
        _check_relative(relative_bias, h)
    named = {"prefix": prefix, "key_mask": key_mask, "query_mask": query_mask, "mask": mask, "bias": bias}
    named |= {"segments of queries": query_segments, "segments of keys": key_segments, "sinks": sinks, "alibi": alibi}
    named |= {"sigmoid_bias": sigmoid_bias, "relative_bias": None if relative_bias is None else relative_bias.table}
    for name, tensor in named.items():
        check_device(name, tensor, q)
    key_mask = _unless_all(key_mask)
    if key_mask is not None:
        # Their weight is 0, and 0 times what they may hold, infinity or NaN, would be NaN.
        k, v = (tensor.masked_fill(~key_mask[:, None, :, None], 0) for tensor in (k, v))
    return Problem(
        q=q,
        k=k,
        v=v,
        scale=1 / math.sqrt(d) if scale is None else float(scale),
        causal=bool(causal),
        offset=n_k - n_q if query_offset is None else query_offset,
        window=window,
        first_tokens=first_tokens,
        prefix=prefix,
        query_segments=query_segments,
        key_segments=key_segments,
        key_mask=key_mask,
        query_mask=_unless_all(query_mask),
        mask=_broadcastable("mask", mask, (b, h, n_q, n_k)),
        bias=_broadcastable("bias", bias, (b, h, n_q, n_k)),
        alibi=alibi,
        relative_bias=relative_bias,
        softcap=softcap,
        sinks=sinks,
        normalizer="sigmoid" if normalizer == "sigmoid" else "softmax",
        sigmoid_bias=sigmoid_bias,
    )


def check_device(name: str, tensor: Tensor | None, q: Tensor) -> None:
    """Raises ValueError where an argument is on another device than the queries."""
    if tensor is not None and tensor.device != q.device:
        raise ValueError(f"{name} is on {tensor.device} and q on {q.device}; expected one device.")


def check_whole(name: str, number: Whole) -> Whole:
    """A whole number as Python's own, whoever's it is; None and a traced number stay what they are.

    Raises:
        ValueError: it is no whole number.
    """
    if number is None or isinstance(number, torch.SymInt):
        return number
    try:
        if not isinstance(number, bool):
            return index(number)
    except TypeError:
        pass
    raise ValueError(f"{name} is {number!r}; expected a whole number.")


def values_can_be_read(tensor: Tensor) -> bool:
    """Whether a tensor has values that Python may look at: not while a graph is traced or captured."""
    if torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; expected [batch, heads, positions, columns].")
        if tensor.dtype not in _FLOATS or tensor.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype} and q {q.dtype}; expected one floating-point dtype.")
        check_device(name, tensor, q)
        if not 1 <= tensor.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(f"{name} has {tensor.shape[-1]} columns a head; expected 1 to {MAX_HEAD_DIM}.")
    b, h, _, d = q.shape
    n, n_k = k.shape[1], k.shape[2]
    if k.shape[0] != b or k.shape[3] != d:
        raise ValueError(f"k has shape {list(k.shape)}; expected [{b}, key heads, keys, {d}] to fit q {list(q.shape)}.")
    if n == 0 or h % n:
        raise ValueError(f"q has {h} heads and k has {n}; expected a multiple.")
    if v.shape[:3] != (b, n, n_k):
        raise ValueError(f"v has shape {list(v.shape)}; expected [{b}, {n}, {n_k}, columns] to fit k {list(k.shape)}.")


def _segments(
    segments: Tensor | tuple[Tensor, Tensor] | None, b: int, n_q: int, n_k: int
) -> tuple[Tensor | None, Tensor | None]:
    if segments is None:
        return None, None
    if isinstance(segments, Tensor):
        if n_q != n_k:
            raise ValueError(f"segments is one tensor for {n_q} queries and {n_k} keys; expected a pair of tensors.")
        segments = (segments, segments)
    # Booleans mark two documents as well as numbers do.
    queries, keys = (ids.long() if ids.dtype == torch.bool else ids for ids in segments)
    _check_shape("segments of queries", queries, (b, n_q))
    _check_shape("segments of keys", keys, (b, n_k))
    return queries, keys


def _check_relative(relative: RelativeBias, heads: int) -> None:
    table, bidirectional, max_distance = relative
    check_whole("max_distance of relative_bias", max_distance)
    if table.dim() != 2 or table.shape[1] != heads:
        raise ValueError(f"relative_bias has a table of shape {list(table.shape)}; expected [buckets, {heads}].")
    _check_float("relative_bias", table)
    exact = table.shape[0] // (4 if bidirectional else 2)
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"relative_bias has {table.shape[0]} buckets and max_distance {max_distance}; "
            "expected at least 4 buckets (2 without bidirectional) and a larger max_distance."
        )


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {list(shape)}.")


def _check_boolean(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    _check_shape(name, tensor, shape)
    if tensor is not None and tensor.dtype != torch.bool:
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected torch.bool, True for what exists.")


def _check_float(name: str, tensor: Tensor | None) -> None:
    if tensor is not None and tensor.dtype not in _FLOATS:
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected a floating-point dtype.")


def _broadcastable(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    if tensor is None:
        return None
    full = tensor.reshape((1,) * (4 - tensor.dim()) + tuple(tensor.shape)) if tensor.dim() < 4 else tensor
    if full.dim() != 4 or any(size not in (1, want) for size, want in zip(full.shape, shape, strict=True)):
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected one that broadcasts to {list(shape)}.")
    return full


def _unless_all(mask: Tensor | None) -> Tensor | None:
    """A mask that hides nothing is dropped here, so no backend pays for it."""
    return None if mask is None or (values_can_be_read(mask) and bool(mask.all())) else mask

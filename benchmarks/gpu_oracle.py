"""Whether what a kernel gave is right, by dense computation of as much as is affordable at any length.

Rows are compared on slices at the beginning, the middle and the end of the sequence, for the first and the last key
head. Sums over queries need every row, so they are added up over slices, for one head; so are gradients of keys and
values up to `EVERY_GRADIENT` tokens, beyond which the gradient of queries alone is compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from attnlab_kernels import Emit, Emitted
from attnlab_kernels.dense import Pattern, dense_attention
from attnlab_kernels.problem import Problem
from attnlab_kernels.request import Request, resolve_request
from attnlab_kernels.resolve import resolve_problem
from torch import Tensor

ROWS = 32
"""Rows of a slice."""

EXACT = 1 << 14
"""Longest sequence that is checked in float64; beyond it in float32."""

EVERY_GRADIENT = 1 << 15
"""Longest sequence on which gradients of keys and values are checked."""

ENTRIES = 1 << 26
"""Entries of the pattern that may exist at one time."""

ROUNDINGS = 16
"""How many roundings of the largest value an output or a gradient may be off by."""

STATISTIC = 2.0**-12
"""Part of the largest value that a statistic, computed in float32, may be off by."""

PER_ROW = ("lse", "entropy", "max_probability", "collision", "key_probes")


class Sums(NamedTuple):
    """Over all queries of one head: for each key, and for each diagonal."""

    key_sum: Tensor
    key_square: Tensor
    key_max: Tensor
    key_count: Tensor
    offsets: Tensor
    offset_counts: Tensor


class Oracle:
    """Dense answers to one problem."""

    def __init__(self, qkv: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]) -> None:
        self.qkv, self.options = qkv, options
        self.problem = resolve_problem(*qkv, **options)
        self.dtype = torch.float64 if self.problem.keys <= EXACT else torch.float32

    def wrong(self, out: Tensor, emitted: Emitted, emit: Emit) -> list[str]:
        """What is off, by name and how far; nothing if all of it is right."""
        problem, request = resolve_request(emit, self.problem)
        found: dict[str, tuple[float, float]] = {}
        for n in sorted({0, problem.key_heads - 1}):
            for i in self._slices():
                cut = self._cut(problem, n, i)
                exact_out, exact = dense_attention(cut, Request(emit=_of_rows(emit)))
                h = slice(n * problem.group, (n + 1) * problem.group)
                _note(found, "out", out[:1, h, i], exact_out, self._roundings(out))
                for name in PER_ROW:
                    got = getattr(emitted, name)
                    if got is not None:
                        _note(found, name, got[:1, h, i], getattr(exact, name), STATISTIC)
                if emitted.argmax is not None:
                    # Where two keys are as large, either will do.
                    keys = emitted.argmax[:1, h, i, None]
                    _, at = dense_attention(cut, Request(emit=Emit(), columns=None, gather=keys[:, 0]))
                    largest = dense_attention(cut, Request(emit=Emit(max_probability=True)))[1].max_probability
                    if at.gathered is not None and largest is not None:
                        _note(found, "argmax", at.gathered[:, :1, :, 0], largest[:, :1], STATISTIC)
        found |= self._wrong_sums(request, emitted)
        return _named(found)

    def wrong_gradients(self, gradients: tuple[Tensor, ...], grad_out: Tensor) -> list[str]:
        """The same for gradients of the output with respect to q, k, v."""
        problem, found = self.problem, dict[str, tuple[float, float]]()
        keys, h = self._cut(problem, 0, slice(0, 1)), slice(0, problem.group)
        by_k, by_v = torch.zeros_like(keys.k), torch.zeros_like(keys.v)
        every = problem.keys <= EVERY_GRADIENT
        most = self._roundings(grad_out)
        for i in self._all_slices() if every else self._slices():
            cut = self._cut(problem, 0, i)
            leaves = [t.detach().requires_grad_() for t in (cut.q, cut.k, cut.v)]
            q, k, v = leaves
            out, _ = dense_attention(replace(cut, q=q, k=k, v=v), Request(emit=Emit()))
            by_q, of_k, of_v = torch.autograd.grad(out, leaves, grad_out[:1, h, i].to(out.dtype))
            by_k += of_k
            by_v += of_v
            _note(found, "gradient of q", gradients[0][:1, h, i], by_q, most)
        if every:
            _note(found, "gradient of k", gradients[1][:1, :1], by_k, most)
            _note(found, "gradient of v", gradients[2][:1, :1], by_v, most)
        return _named(found)

    def _wrong_sums(self, request: Request, emitted: Emitted) -> dict[str, tuple[float, float]]:
        found: dict[str, tuple[float, float]] = {}
        if not (request.key_statistics or request.pools or request.edges):
            return found
        sums = self._sums
        want = {name: getattr(sums, name) for name in ("key_sum", "key_square", "key_max", "key_count")}
        if request.pools:
            want["pooled"] = self._pooled(request.pools[0])
        if request.edges:
            for name, profile in (("offsets", sums.offsets), ("offset_count", sums.offset_counts)):
                want[name] = _in_bins(profile, request.edges[0], self.problem)
        for name, exact in want.items():
            got = getattr(emitted, name)
            if got is not None:
                _note(found, name, got[:1, :1].flatten(), exact.flatten(), STATISTIC)
        return found

    def _cut(self, problem: Problem, n: int, i: slice) -> Problem:
        """One key head of the first batch row, some queries, all keys, in the oracle's precision."""
        cut = problem.cut(slice(0, 1), slice(n, n + 1), i, slice(0, problem.keys))
        tensors = {name: getattr(cut, name) for name in ("q", "k", "v", "key_probes")}
        return replace(cut, **{name: t.to(self.dtype) for name, t in tensors.items() if t is not None})

    @cached_property
    def _sums(self) -> Sums:
        """Everything over queries of the first head."""
        n_q, n_k, device = self.problem.queries, self.problem.keys, self.problem.q.device

        def zeros(length: int) -> Tensor:
            return torch.zeros(length, dtype=self.dtype, device=device)

        sums = Sums(*(zeros(n_k) for _ in range(4)), *(zeros(n_q + n_k - 1) for _ in range(2)))
        for i in self._all_slices():
            a, seen = self._pattern(i)
            sums.key_sum.add_(a.sum(0))
            sums.key_square.add_(a.square().sum(0))
            torch.maximum(sums.key_max, a.amax(0), out=sums.key_max)
            sums.key_count.add_(seen.sum(0))
            # Place c of a profile holds j - i = c - (Nq - 1).
            at = slice(n_q - i.stop, n_q - i.stop + n_k + i.stop - i.start - 1)
            sums.offsets[at] += _diagonals(a)
            sums.offset_counts[at] += _diagonals(seen)
        return sums

    def _pooled(self, size: int) -> Tensor:
        means = []
        for i in self._all_slices(size):
            a, seen = (_blocks(t, size) for t in self._pattern(i))
            means.append(a / seen.clamp(min=1))
        return torch.cat(means)

    def _pattern(self, i: slice) -> tuple[Tensor, Tensor]:
        """Some rows of the first head's pattern, and 1 where the query sees the key."""
        cut = self._cut(replace(self.problem, key_probes=None), 0, i)
        pattern = Pattern(replace(cut, q=cut.q[:, :1]))
        return pattern.weights[0, 0], pattern.seen[0, 0].to(self.dtype)

    def _slices(self) -> list[slice]:
        last = self.problem.queries
        starts = sorted({0, max(0, last // 2 - ROWS // 2), max(0, last - ROWS)})
        return [slice(start, min(last, start + ROWS)) for start in starts]

    def _all_slices(self, multiple: int = 1) -> Iterator[slice]:
        """All rows, by the most of a multiple that fit."""
        last = self.problem.queries
        step = max(1, ENTRIES // max(1, self.problem.keys * multiple)) * multiple
        return (slice(start, min(last, start + step)) for start in range(0, last, step))

    def _roundings(self, tensor: Tensor) -> float:
        return ROUNDINGS * torch.finfo(tensor.dtype).eps


def _of_rows(emit: Emit) -> Emit:
    return Emit(
        lse=emit.lse, entropy=emit.entropy, max_probability=emit.max_probability, collision=emit.collision,
    )  # fmt: skip


def _named(found: dict[str, tuple[float, float]]) -> list[str]:
    return [f"{name} is off by {off:.1e} of the largest" for name, (off, most) in found.items() if not off <= most]


def _diagonals(entries: Tensor) -> Tensor:
    """Sums along the diagonals of [i, j], from that of the last row's first key on."""
    rows, keys = entries.shape
    # Rows one longer than the shifted ones, read as if they were not, stand one place further right each.
    padded = torch.nn.functional.pad(entries.flip(0), (0, rows)).flatten()
    return padded[: rows * (rows + keys - 1)].view(rows, rows + keys - 1).sum(0)


def _blocks(entries: Tensor, size: int) -> Tensor:
    rows, keys = entries.shape
    padded = torch.nn.functional.pad(entries, (0, -keys % size, 0, -rows % size))
    return padded.unflatten(1, (-1, size)).unflatten(0, (-1, size)).sum((1, 3))


def _in_bins(profile: Tensor, edges: Tensor, problem: Problem) -> Tensor:
    """Sums over the distances i + offset - j of each bin."""
    distance = problem.queries - 1 + problem.offset - torch.arange(len(profile), device=profile.device)
    number = torch.bucketize(distance, edges, right=True) - 1
    inside = (number >= 0) & (number < len(edges) - 1)
    bins = torch.zeros(len(edges) - 1, dtype=profile.dtype, device=profile.device)
    return bins.index_add_(0, number[inside], profile[inside])


def _note(found: dict[str, tuple[float, float]], name: str, got: Tensor, want: Tensor, most: float) -> None:
    """Keep the largest error, as a part of the largest value; NaN where that is what came out."""
    scale = max(float(want.abs().max()), 1e-30) if want.numel() else 1.0
    off = float((got.to(want.dtype) - want).abs().max()) / scale if want.numel() else 0.0
    held = found.get(name, (0.0, most))[0]
    found[name] = (off if off != off or off > held else held, most)

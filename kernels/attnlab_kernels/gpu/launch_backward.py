"""Chooses tiles for a backward, allocates what it writes, and launches it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnlab_kernels.gpu.arguments import LOG2E, kernel_inputs, padded, strided
from attnlab_kernels.gpu.configs import (
    Launch,
    bias_gradient_launch,
    choose_head_parts,
    key_gradient_launch,
    query_gradient_launch,
)
from attnlab_kernels.gpu.gradient_keys import KeySide, key_gradient_kernel
from attnlab_kernels.gpu.gradient_queries import QuerySide, bias_gradient_kernel, query_gradient_kernel
from attnlab_kernels.gpu.gradient_tile import Above, delta_kernel
from attnlab_kernels.gpu.launch_forward import Rows
from attnlab_kernels.gpu.schedule import make_schedules
from attnlab_kernels.gradients import ResultGradients
from attnlab_kernels.problem import Problem

MAX_PROBES = 64
"""Most probe columns of one pass: their float32 gradient shares the registers with those of keys and values."""


class Kept(NamedTuple):
    """Results of the forward that its backward reads; those that no gradient reaches may be None."""

    rows: Rows
    out: Tensor | None = None
    entropy: Tensor | None = None
    key_probes: Tensor | None = None


def run_backward(
    problem: Problem,
    kept: Kept,
    grads: ResultGradients,
    needed: Collection[str],
    launch: Launch | None = None,
    parts: int | None = None,
) -> dict[str, Tensor]:
    """Gradients of the learned tensors named in `needed`, as `Problem.learned` names them, in their own dtypes.

    Args:
        problem: what the forward computed.
        kept: what the forward left.
        grads: what reaches its results, in any layout.
        needed: which gradients to compute.
        launch: tile sizes of every kernel; the tables' by default.
        parts: over how many programs the heads of a group are spread, by default as many as keep a GPU busy.
    """
    learned = problem.learned()
    found: dict[str, Tensor] = {}
    columns: list[Tensor] = []
    if problem.batch and problem.heads and any(grad is not None for grad in grads):
        for one in _passes(problem, kept, grads):
            # One after another, so that no two passes' temporaries exist at once.
            for name, gradient in one.gradients(needed, launch, parts).items():
                if name == "key_probes":
                    columns.append(gradient)
                else:
                    found[name] = found[name].float() + gradient if name in found else gradient
    if columns:
        found["key_probes"] = torch.cat(columns, dim=-1)
    return {
        name: found[name].to(learned[name].dtype) if name in found else torch.zeros_like(learned[name])
        for name in needed
    }


def _passes(problem: Problem, kept: Kept, grads: ResultGradients) -> Iterator[_Pass]:
    """Wide probes take several passes, of which the first computes everything else: gradients are sums over them."""
    probes, result, above = problem.key_probes, kept.key_probes, grads.key_probes
    if probes is None or result is None or above is None or not probes.shape[-1]:
        yield _Pass(replace(problem, key_probes=None), kept, grads._replace(key_probes=None))
        return
    for start in range(0, probes.shape[-1], MAX_PROBES):
        some = slice(start, start + MAX_PROBES)
        yield _Pass(
            replace(problem, key_probes=probes[..., some]),
            kept._replace(key_probes=result[..., some]),
            (ResultGradients() if start else grads)._replace(key_probes=above[..., some]),
        )


class _Pass:
    """One recomputation of the pattern, for some of what reaches the results."""

    def __init__(self, problem: Problem, kept: Kept, grads: ResultGradients) -> None:
        self._problem, self._rows = problem, kept.rows
        b, h, n_q = problem.batch, problem.heads, problem.queries
        self._x = kernel_inputs(problem)
        self._d_out = strided(grads.out, b, h, n_q, problem.v.shape[-1])
        probes = None if grads.key_probes is None else grads.key_probes.float()
        self._d_probes = strided(probes, b, h, n_q, self._x.g.value)
        centre: Tensor | None = None
        if problem.normalizer == "softmax":
            centre = self._delta(kept)
        if grads.lse is not None:
            centre = -grads.lse.float() if centre is None else centre - grads.lse.float()
        d_entropy: Tensor | None = None
        if grads.entropy is not None and kept.entropy is not None:
            d_entropy = grads.entropy.float()
            term = d_entropy * kept.entropy
            centre = term if centre is None else centre + term
            d_entropy = (d_entropy / LOG2E).contiguous()
        self._above = Above(
            d_out=self._d_out,
            d_probes=self._d_probes,
            pivot=kept.rows.pivot,
            log_z=kept.rows.log_z,
            centre=None if centre is None else centre.contiguous(),
            d_entropy=d_entropy,
            precision=tl.constexpr("ieee" if torch.version.hip else "tf32x3"),
        )
        self._blocks = {
            "BLOCK_D": padded(problem.q.shape[-1]),
            "BLOCK_DV": padded(problem.v.shape[-1]) if self._d_out is not None else 16,
            "BLOCK_G": padded(self._x.g.value),
        }

    def gradients(self, needed: Collection[str], launch: Launch | None, parts: int | None) -> dict[str, Tensor]:
        """Those of `needed` that anything here reaches."""
        problem = self._problem
        bias = problem.bias if "bias" in needed else None
        # A bias that broadcasts along queries or keys gets sums that the other kernels have at hand.
        by_row = bias is not None and bias.shape[3] == 1
        by_column = bias is not None and not by_row and bias.shape[2] == 1
        found: dict[str, Tensor] = {}
        if {"k", "v", "key_probes"} & set(needed) or by_column:
            found |= self._key_side(needed, by_column, launch, parts)
        if {"q", "alibi", "relative_bias", "sigmoid_bias"} & set(needed) or by_row:
            found |= self._query_side(needed, by_row, launch)
        if bias is not None and not (by_row or by_column):
            found["bias"] = self._whole_bias(bias, launch)
        if "sinks" in needed and problem.sinks is not None:
            found["sinks"] = self._sinks(problem.sinks)
        return found

    def _delta(self, kept: Kept) -> Tensor | None:
        """What the weighted mean of dP is in each row."""
        problem, x = self._problem, self._x
        if self._d_out is None and self._d_probes is None:
            return None
        b, h, n_q, block = problem.batch, problem.heads, problem.queries, 64
        delta = self._empty(b, h, n_q)
        if n_q:
            delta_kernel[(b * h, triton.cdiv(n_q, block))](
                x,
                self._d_out,
                None if self._d_out is None else strided(kept.out, b, h, n_q, problem.v.shape[-1]),
                self._d_probes,
                None if self._d_probes is None else strided(kept.key_probes, b, h, n_q, x.g.value),
                delta,
                BLOCK_M=block,
                BLOCK_DV=padded(problem.v.shape[-1]),
                BLOCK_G=padded(x.g.value),
                num_warps=4,
                enable_fp_fusion=True,
            )
        return delta

    def _key_side(
        self, needed: Collection[str], by_column: bool, launch: Launch | None, parts: int | None
    ) -> dict[str, Tensor]:
        problem = self._problem
        b, n, n_k, g = problem.batch, problem.key_heads, problem.keys, self._x.g.value
        if launch is None:
            columns, size = (problem.q.shape[-1], problem.v.shape[-1], g), problem.q.element_size()
            launch = key_gradient_launch(*columns, size, self._x.raw.value, self._above.d_entropy is not None)
        tiles = triton.cdiv(n_k, launch.block_n)
        if parts is None:
            parts = choose_head_parts(b * n * tiles, problem.group)
        dtype = problem.q.dtype if parts == 1 else torch.float32
        probes = problem.key_probes if "key_probes" in needed and self._d_probes is not None else None
        per_head = probes is not None and probes.shape[1] > 1
        wanted = KeySide(
            k=self._empty(parts, b, n, n_k, problem.q.shape[-1], dtype=dtype) if "k" in needed else None,
            v=self._empty(parts, b, n, n_k, problem.v.shape[-1], dtype=dtype)
            if "v" in needed and self._d_out is not None
            else None,
            f=self._empty(parts, b, n, n_k, g) if probes is not None and not per_head else None,
            f_heads=self._empty(b, problem.heads, n_k, g) if per_head else None,
            columns=self._empty(b, problem.heads, n_k) if by_column else None,
        )
        if n_k:
            key_gradient_kernel[(b * n, tiles, parts)](
                self._x, make_schedules(problem, launch.block_m, launch.block_n).over_queries, self._above, wanted,
                parts, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, **self._blocks,
                **launch.options(),
            )  # fmt: skip
        found: dict[str, Tensor] = {}
        for name, sums in (("k", wanted.k), ("v", wanted.v)):
            if sums is not None:
                found[name] = sums[0] if parts == 1 else sums.sum(0)
        if probes is not None:
            sums = wanted.f_heads if per_head else wanted.f.sum(0)
            found["key_probes"] = sums.sum_to_size(probes.shape)
        if by_column and problem.bias is not None and wanted.columns is not None:
            found["bias"] = wanted.columns[:, :, None].sum_to_size(problem.bias.shape)
        return found

    def _query_side(self, needed: Collection[str], by_row: bool, launch: Launch | None) -> dict[str, Tensor]:
        problem, x = self._problem, self._x
        b, h, n_q, d = problem.batch, problem.heads, problem.queries, problem.q.shape[-1]
        relative = problem.relative_bias if "relative_bias" in needed else None
        if launch is None:
            columns, size = (d, problem.v.shape[-1], x.g.value), problem.q.element_size()
            launch = query_gradient_launch(*columns, size, self._above.d_entropy is not None)
        tiles = triton.cdiv(n_q, launch.block_m)
        buckets = padded(1 if relative is None else relative.table.shape[0])
        wanted = QuerySide(
            q=self._empty(b, h, n_q, d, dtype=problem.q.dtype) if "q" in needed else None,
            rows=self._empty(b, h, n_q) if by_row or "sigmoid_bias" in needed else None,
            slopes=self._empty(b, h, n_q) if "alibi" in needed else None,
            table=None if relative is None else self._empty(b, h, tiles, buckets),
        )
        if n_q:
            query_gradient_kernel[(b * h, tiles)](
                x, make_schedules(problem, launch.block_m, launch.block_n).over_keys, self._above, wanted,
                BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_U=buckets, **self._blocks,
                **launch.options(),
            )  # fmt: skip
        found: dict[str, Tensor] = {}
        if wanted.q is not None:
            found["q"] = wanted.q
        if wanted.rows is not None and "sigmoid_bias" in needed:
            found["sigmoid_bias"] = wanted.rows.sum((0, 2))
        if wanted.rows is not None and by_row and problem.bias is not None:
            found["bias"] = wanted.rows[..., None].sum_to_size(problem.bias.shape)
        if wanted.slopes is not None:
            found["alibi"] = wanted.slopes.sum((0, 2))
        if wanted.table is not None and relative is not None:
            found["relative_bias"] = wanted.table.sum((0, 2))[:, : relative.table.shape[0]].T
        return found

    def _whole_bias(self, bias: Tensor, launch: Launch | None) -> Tensor:
        problem = self._problem
        n_q, n_k = problem.queries, problem.keys
        if launch is None:
            launch = bias_gradient_launch(problem.q.shape[-1], problem.v.shape[-1], problem.q.element_size())
        gradient = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
        if n_q and n_k:
            grid = (
                bias.shape[0] * bias.shape[1],
                triton.cdiv(n_q, launch.block_m),
                triton.cdiv(n_k, launch.block_n),
            )
            bias_gradient_kernel[grid](
                self._x, self._above, gradient, bias.shape[1], problem.batch // bias.shape[0],
                problem.heads // bias.shape[1], BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, **self._blocks,
                **launch.options(),
            )  # fmt: skip
        return gradient

    def _sinks(self, sinks: Tensor) -> Tensor:
        """A learned sink is one more logit without a value, so its dP is 0."""
        pivot, log_z = self._rows
        t = sinks.float()[:, None] * LOG2E - pivot - log_z
        gradient = 0 if self._above.centre is None else -self._above.centre
        if self._above.d_entropy is not None:
            gradient = gradient - self._above.d_entropy * torch.where(t == -torch.inf, 0, t)
        return (torch.exp2(t) * gradient).sum((0, 2))

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._problem.q.device)

"""Chooses tiles for a forward, allocates what it writes, and launches it."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from attnlab_kernels.counts import has_closed_form, keys_seen
from attnlab_kernels.gpu.architecture import architecture_of
from attnlab_kernels.gpu.arguments import Inputs, kernel_inputs, padded
from attnlab_kernels.gpu.autotune import fastest, kind_of
from attnlab_kernels.gpu.configs import Launch, choose_parts, forward_launches
from attnlab_kernels.gpu.forward import Outputs, Partials, forward_kernel, merge_kernel
from attnlab_kernels.gpu.schedule import make_schedules
from attnlab_kernels.problem import Problem
from attnlab_kernels.request import Request

MAX_PROBES = 64
"""Most probe columns of one launch: their float32 accumulator shares the registers with the output's."""

ROW_STATISTICS = ("lse", "entropy", "max_probability", "argmax", "collision", "visible", "learned_sink_mass")


class Rows(NamedTuple):
    """What later passes need of each row, [B, Hq, Nq] in float32: A = 2^(s c - pivot - log_z)."""

    pivot: Tensor
    log_z: Tensor


class Forward(NamedTuple):
    """What a forward wrote: the output, row statistics and key probes by name, and each row's normaliser."""

    out: Tensor
    found: dict[str, Tensor]
    rows: Rows | None


def run_forward(
    problem: Problem, request: Request, keep_rows: bool, launch: Launch | None = None, parts: int | None = None
) -> Forward:
    """Output, row statistics and key probes.

    Args:
        problem: what to compute.
        request: the statistics asked for.
        keep_rows: whether a later pass will want the rows' normalisers.
        launch: tile sizes; the table's by default.
        parts: over how many programs the keys of a tile of queries are spread; by default as many as keep a GPU busy.
    """
    q, device = problem.q, problem.q.device
    b, h, n_q, dv = problem.batch, problem.heads, problem.queries, problem.v.shape[-1]
    probes = problem.key_probes
    out = torch.empty(b, h, n_q, dv, dtype=q.dtype, device=device)
    found = {
        name: torch.empty(b, h, n_q, dtype=torch.int64 if name == "argmax" else torch.float32, device=device)
        for name in ROW_STATISTICS
        if (problem.sinks is not None if name == "learned_sink_mass" else getattr(request.emit, name))
    }
    counted = "visible" in found and has_closed_form(problem)
    if counted:
        found["visible"] = keys_seen(problem).expand(b, h, n_q).contiguous()
    rows = Rows(*(torch.empty(b, h, n_q, dtype=torch.float32, device=device) for _ in range(2))) if keep_rows else None
    written: dict[str, Tensor | None] = {name: found.get(name) for name in ROW_STATISTICS}
    if counted:
        written["visible"] = None
    wanted = Outputs(out=out, probes=None, pivot=rows and rows.pivot, log_z=rows and rows.log_z, **written)
    if probes is None:
        _launch(problem, wanted, launch, parts)
        return Forward(out, found, rows)
    # Wider probes take several passes, of which the first computes everything else.
    columns = []
    for start in range(0, max(1, probes.shape[-1]), MAX_PROBES):
        some = probes[..., start : start + MAX_PROBES]
        columns.append(torch.empty(b, h, n_q, some.shape[-1], dtype=torch.float32, device=device))
        if some.shape[-1]:
            _launch(replace(problem, key_probes=some), wanted._replace(probes=columns[-1]), launch, parts)
        else:
            _launch(replace(problem, key_probes=None), wanted, launch, parts)
        wanted = Outputs(*(None for _ in wanted))
    found["key_probes"] = columns[0] if len(columns) == 1 else torch.cat(columns, dim=-1)
    return Forward(out, found, rows)


def find_rows(problem: Problem) -> Rows:
    """The rows' normalisers alone, without the output; under the sigmoid normaliser, which has none, zeros."""
    shape, device = (problem.batch, problem.heads, problem.queries), problem.q.device
    if problem.normalizer == "sigmoid":
        return Rows(*torch.zeros(2, *shape, dtype=torch.float32, device=device))
    rows = Rows(*(torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2)))
    problem = replace(problem, key_probes=None)
    wanted = Outputs(*(None for _ in Outputs._fields))._replace(pivot=rows.pivot, log_z=rows.log_z)
    _launch(problem, wanted, None, None)
    return rows


def _launch(problem: Problem, wanted: Outputs, launch: Launch | None, parts: int | None) -> None:
    b, h, n_q = problem.batch, problem.heads, problem.queries
    if not (b and h and n_q):
        return
    if launch is None:
        launch = _choose(problem, wanted, parts)
    x = kernel_inputs(problem)
    schedule = make_schedules(problem, launch.block_m, launch.block_n).over_keys
    tiles = triton.cdiv(n_q, launch.block_m)
    if parts is None:
        parts = choose_parts(b * h * tiles, triton.cdiv(problem.keys, launch.block_n))
    blocks = {"BLOCK_DV": padded(problem.v.shape[-1]), "BLOCK_G": padded(x.g.value)}
    partials = None if parts == 1 else _partials(x, wanted, b * h * n_q, parts, problem.q.device)
    forward_kernel[(b * h, tiles, parts)](
        x, schedule, wanted, partials, parts,
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_D=padded(problem.q.shape[-1]), **blocks,
        PROBE_PRECISION="ieee" if torch.version.hip else "tf32x3", SPLIT=partials is not None,
        **launch.options(),
    )  # fmt: skip
    if partials is not None:
        block = 16
        merge_kernel[(b * h, triton.cdiv(n_q, block))](
            x, wanted, partials, parts, BLOCK_M=block, **blocks, num_warps=4, enable_fp_fusion=True
        )


def _choose(problem: Problem, wanted: Outputs, parts: int | None) -> Launch:
    q, chip = problem.q, architecture_of(problem.q)
    choices = forward_launches(
        chip,
        q.shape[-1],
        problem.v.shape[-1],
        q.element_size(),
        argmax=wanted.argmax is not None,
        probes=0 if wanted.probes is None else wanted.probes.shape[-1],
    )
    written = tuple(tensor is not None for tensor in wanted)
    key = ("forward", chip, written, parts, kind_of(problem))
    return fastest(key, choices, lambda launch: _launch(problem, wanted, launch, parts), q)


def _partials(x: Inputs, wanted: Outputs, rows: int, parts: int, device: torch.device) -> Partials:
    def sums(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(parts, rows, *shape, dtype=dtype, device=device)

    return Partials(
        acc=sums(x.dv.value) if wanted.out is not None else None,
        acc_f=sums(x.g.value) if wanted.probes is not None else None,
        **{name: sums() for name in ("m", "pivot", "z", "u", "w")},
        **{name: sums(dtype=torch.int32) for name in ("best", "seen")},
    )

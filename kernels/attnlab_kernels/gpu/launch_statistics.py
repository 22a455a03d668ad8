"""Chooses what the second pass computes in which launch, allocates what it writes, and adds up its parts."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnlab_kernels.counts import has_closed_form, queries_seeing
from attnlab_kernels.distances import bin_sums, entries_at, has_closed_form_at_distances
from attnlab_kernels.gpu.architecture import architecture_of
from attnlab_kernels.gpu.arguments import kernel_inputs, padded, strided
from attnlab_kernels.gpu.configs import Launch, choose_parts, diagonals_launch, statistics_launch
from attnlab_kernels.gpu.diagonals import sums_at_distances
from attnlab_kernels.gpu.launch_forward import MAX_PROBES, Rows
from attnlab_kernels.gpu.pools import make_pool, means, pieces_later
from attnlab_kernels.gpu.profiles import MOST_BINS, make_profile
from attnlab_kernels.gpu.schedule import make_schedules
from attnlab_kernels.gpu.statistics import Factors, Wanted, statistics_kernel
from attnlab_kernels.problem import Problem
from attnlab_kernels.request import Request

KEY_STATISTICS = ("key_sum", "key_square", "key_max")


class Job(NamedTuple):
    """What one launch computes.

    Attributes:
        keys: names of key statistics, `key_count` among them where it has to be counted.
        probes: [b or 1, h or 1, Nq, G], at most `MAX_PROBES` of the query probes.
        size: block size of a pooled map.
        edges: sorted edges of an offset profile, fewer than `MOST_BINS`.
    """

    keys: tuple[str, ...]
    probes: Tensor | None
    size: int | None
    edges: Tensor | None


def run_statistics(
    problem: Problem, request: Request, rows: Rows, launch: Launch | None = None, parts: int | None = None
) -> dict[str, object]:
    """Key statistics, query probes, pooled maps and offset profiles, by the names of `Emitted`.

    Args:
        problem: what to compute.
        request: the statistics asked for.
        rows: the rows' normalisers, from the forward.
        launch: tile sizes; the table's by default. A profile of many bins takes square tiles of `block_m`.
        parts: over how many programs the queries of a tile of keys are spread; by default as many as keep a GPU busy.
    """
    problem = replace(problem, key_probes=None)
    if not (problem.batch and problem.heads and problem.queries and problem.keys):
        return _nothing(problem, request)
    factors = _factors(problem, rows)
    edges = torch.cat(request.edges).sort().values if request.edges else None
    few_bins = edges is not None and edges.numel() < MOST_BINS
    done = [
        _launch(problem, factors, job, launch, parts) for job in _jobs(problem, request, edges if few_bins else None)
    ]
    found: dict[str, object] = {name: value for job in done for name, value in job.items() if name.startswith("key")}
    if request.key_statistics and "key_count" not in found:
        shape = (problem.batch, problem.heads, problem.keys)
        found["key_count"] = queries_seeing(problem).expand(shape).clone()
    if request.query_probes is not None:
        found["query_probes"] = torch.cat([job["probes"] for job in done if "probes" in job], dim=-1)
    if request.pools:
        for name in ("pooled", "pooled_count"):
            maps = tuple(job[name] for job in done if name in job)
            found[name] = maps if request.several_pools else maps[0]
    if edges is not None:
        if few_bins:
            # What lies before the first edge is in no bin that was asked for.
            sums, counts, starts = done[0]["bins"][..., 1:], done[0].get("bin_counts"), edges
            counts = None if counts is None else counts[..., 1:]
        else:
            sums, counts, starts = _at_distances(problem, factors, launch)
        found |= _profiles(problem, request, sums, counts, starts)
    return found


def _nothing(problem: Problem, request: Request) -> dict[str, object]:
    """Zeros, where there are no entries at all."""
    b, h, n_q, n_k = problem.batch, problem.heads, problem.queries, problem.keys

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(b, h, *shape, device=problem.q.device)

    names = [name for name in KEY_STATISTICS if getattr(request.emit, name)]
    found: dict[str, object] = {name: zeros(n_k) for name in [*names, "key_count"] if request.key_statistics}
    if request.query_probes is not None:
        found["query_probes"] = zeros(n_k, request.query_probes.shape[-1])
    for names, shapes, several in (
        (["pooled", "pooled_count"], [(-(-n_q // s), -(-n_k // s)) for s in request.pools], request.several_pools),
        (["offsets", "offset_count"], [(len(e) - 1,) for e in request.edges], request.several_edges),
    ):
        for name in names if shapes else ():
            found[name] = tuple(zeros(*shape) for shape in shapes) if several else zeros(*shapes[0])
    return found


def _factors(problem: Problem, rows: Rows) -> Factors:
    shift = -rows.pivot
    factor = torch.ones_like(shift) if problem.normalizer == "sigmoid" else torch.exp2(-rows.log_z)
    if problem.query_mask is not None:
        padding = ~problem.query_mask[:, None]
        shift, factor = shift.masked_fill(padding, -torch.inf), factor.masked_fill(padding, 0)
    return Factors(shift, factor, None)


def _jobs(problem: Problem, request: Request, edges: Tensor | None) -> list[Job]:
    """The first launch takes one of each; further maps, and probes beyond its columns, take one more each."""
    keys = tuple(name for name in KEY_STATISTICS if getattr(request.emit, name))
    if keys and not has_closed_form(problem):
        keys += ("key_count",)
    probes = () if request.query_probes is None else request.query_probes.split(MAX_PROBES, dim=-1)
    jobs = []
    for number in range(max(len(probes), len(request.pools), int(bool(keys) or edges is not None))):
        jobs.append(
            Job(
                keys=() if number else keys,
                probes=probes[number] if number < len(probes) else None,
                size=request.pools[number] if number < len(request.pools) else None,
                edges=None if number else edges,
            )
        )
    return jobs


def _launch(
    problem: Problem, factors: Factors, job: Job, launch: Launch | None, parts: int | None
) -> dict[str, Tensor]:
    """Key statistics by name, `probes`, `pooled` and `pooled_count`, `bins` and `bin_counts` with those outside."""
    b, h, n_q, n_k, device = problem.batch, problem.heads, problem.queries, problem.keys, problem.q.device
    columns = 0 if job.probes is None else job.probes.shape[-1]
    if launch is None:
        launch = statistics_launch(
            architecture_of(problem.q), problem.q.shape[-1], problem.q.element_size(), columns, problem.bias is not None
        )
    tiles = triton.cdiv(n_k, launch.block_n)
    if parts is None:
        parts = choose_parts(b * h * tiles, triton.cdiv(n_q, launch.block_m))

    def sums(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(parts, b * h, *shape, dtype=dtype, device=device)

    x = kernel_inputs(problem)
    keys = {name: sums(n_k, dtype=torch.int32 if name == "key_count" else torch.float32) for name in job.keys}
    probes = pool = profile = bin_counts = None
    if job.probes is not None:
        probes = sums(n_k, columns)
        x = x._replace(f=strided(job.probes, b, h, n_q, columns), g=tl.constexpr(columns))
    if job.size is not None:
        pool = make_pool(job.size, b, h, n_q, n_k, launch, device)
        if pool.split.value:
            later = pieces_later(pool, torch.arange(n_q, device=device))
            factor = factors.factor
            factors = factors._replace(factor=factor.masked_fill(later, 0), later=factor.masked_fill(~later, 0))
    if job.edges is not None:
        profile = make_profile(problem, job.edges, (parts, b * h, tiles))
        if not has_closed_form_at_distances(problem):
            bin_counts = torch.empty_like(profile.sums, dtype=torch.int32)
    wanted = Wanted(
        **{name: keys.get(name) for name in (*KEY_STATISTICS, "key_count")},
        probes=probes if columns else None,
        pool=pool,
        profile=profile,
        bin_counts=bin_counts,
        precision=tl.constexpr("ieee" if torch.version.hip else "tf32x3"),
    )
    statistics_kernel[(b * h, tiles, parts)](
        x, make_schedules(problem, launch.block_m, launch.block_n).over_queries, factors, wanted, parts,
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_D=padded(problem.q.shape[-1]), BLOCK_G=padded(columns),
        BINS=1 if profile is None else profile.bins.value,
        **launch.options(),
    )  # fmt: skip

    found = {
        name: (of_parts.amax(0) if name == "key_max" else of_parts.sum(0)).float().unflatten(0, (b, h))
        for name, of_parts in keys.items()
    }
    if probes is not None:
        found["probes"] = probes.sum(0).unflatten(0, (b, h))
    if pool is not None:
        found["pooled"], found["pooled_count"] = means(pool, b, h, n_q, n_k)
    if profile is not None and job.edges is not None:
        bins = job.edges.numel() + 1
        found["bins"] = profile.sums.sum((0, 2), dtype=torch.float64)[..., :bins].unflatten(0, (b, h))
        if bin_counts is not None:
            found["bin_counts"] = bin_counts.sum((0, 2), dtype=torch.int64)[..., :bins].unflatten(0, (b, h))
    return found


def _at_distances(problem: Problem, factors: Factors, launch: Launch | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Sums in float64, counts where positions do not give them, and the distances that they stand at."""
    count = not has_closed_form_at_distances(problem)
    if launch is None:
        launch = diagonals_launch(architecture_of(problem.q), problem.q.shape[-1], problem.q.element_size())
    sums, counts = sums_at_distances(problem, factors, launch, count)
    return sums.double(), None if counts is None else counts.long(), _distances(problem)


def _distances(problem: Problem) -> Tensor:
    first = problem.offset - (problem.keys - 1)
    return torch.arange(first, problem.queries + problem.offset, device=problem.q.device)


def _profiles(
    problem: Problem, request: Request, sums: Tensor, counts: Tensor | None, starts: Tensor
) -> dict[str, object]:
    """Every profile asked for, out of sums over bins or distances that are at least as narrow."""
    shape = (problem.batch, problem.heads, -1)
    count_starts = starts
    if counts is None:
        count_starts = _distances(problem)
        counts = entries_at(problem, count_starts)[:, None]
    profiles = tuple(bin_sums(sums, starts, edges).float() for edges in request.edges)
    numbers = tuple(bin_sums(counts, count_starts, edges).float().expand(shape).clone() for edges in request.edges)
    several = request.several_edges
    return {"offsets": profiles if several else profiles[0], "offset_count": numbers if several else numbers[0]}

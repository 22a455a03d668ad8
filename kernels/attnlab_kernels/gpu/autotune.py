"""Opt-in choice of tile sizes by the clock.

Whole launches are timed with triton's own `do_bench`, not single kernels as `triton.autotune` does: lists of tiles,
grids and the split of the keys all follow from the tile sizes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench

from attnlab_kernels.gpu.configs import Launch
from attnlab_kernels.problem import Problem
from attnlab_kernels.tuning import autotune_enabled

_chosen: dict[Hashable, Launch] = {}


def fastest(key: Hashable, choices: Sequence[Launch], run: Callable[[Launch], None], q: Tensor) -> Launch:
    """The first choice; where tuning is on, that which runs fastest, found once for each key.

    Choices that the chip refuses are passed over. While a CUDA graph is captured nothing is timed.

    Args:
        key: what the best choice may depend on.
        choices: the table's choice and others, all of which give the same result.
        run: launches with a choice; called many times.
        q: where it runs.
    """
    if not autotune_enabled() or len(choices) == 1:
        return choices[0]
    if key in _chosen:
        return _chosen[key]
    if q.is_cuda and torch.cuda.is_current_stream_capturing():
        return choices[0]
    times: dict[Launch, float] = {}
    for launch in choices:
        try:
            times[launch] = _milliseconds(run, launch, q)
        except (OutOfResources, PTXASError):
            continue
    _chosen[key] = min(times, key=times.__getitem__) if times else choices[0]
    return _chosen[key]


def kind_of(problem: Problem) -> Hashable:
    """What of a problem tile sizes may depend on: widths, options in use, and lengths to a factor of two."""
    given = [field.name for field in fields(problem) if _is_used(getattr(problem, field.name))]
    sizes = (problem.batch * problem.heads, problem.group, problem.queries, problem.keys)
    probes = 0 if problem.key_probes is None else problem.key_probes.shape[-1]
    widths = (problem.q.shape[-1], problem.v.shape[-1], probes)
    return (problem.q.dtype, problem.normalizer, widths, tuple(given), tuple(size.bit_length() for size in sizes))


def _is_used(option: object) -> bool:
    return option is not None and option is not False


def _milliseconds(run: Callable[[Launch], None], launch: Launch, q: Tensor) -> float:
    if q.is_cuda:
        return float(do_bench(lambda: run(launch), warmup=10, rep=50, return_mode="median"))
    # The interpreter's time says nothing about a chip; every choice runs, so that all of them can be tested.
    start = time.perf_counter()
    run(launch)
    return time.perf_counter() - start

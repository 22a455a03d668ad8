"""Runs strips of tiles on the processor's cores (backend `tiled`).

Each core works through strips of its own, with single-threaded operations. With every operation spread over all
cores instead, each of some thousand operations ends in a barrier, and whenever another process holds one core the rest
wait for a time slice: a call of 0.25 s then took 2 to 10. Strips write to separate places and sum in their own fixed
order, so the result does not depend on which core ran what.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from attnlab_kernels.problem import Problem
from attnlab_kernels.rows import Workspace
from attnlab_kernels.tiles import Tile

WORTH_THREADS = 1 << 18
"""Scores below which more than one core costs more than it saves."""


def run_strips(run: Callable[[list[Tile], Workspace], None], strips: list[list[Tile]], problem: Problem) -> None:
    """Call `run` once for each strip, with a workspace that no other thread uses at the time."""
    threads = torch.get_num_threads()
    workers = min(threads, len(strips))
    scores = problem.batch * problem.heads * problem.queries * problem.keys
    if problem.q.device.type != "cpu" or (workers < 2 and scores >= WORTH_THREADS):
        _run_here(run, strips, problem)
        return
    if workers < 2 or scores < WORTH_THREADS:
        torch.set_num_threads(1)
        try:
            _run_here(run, strips, problem)
        finally:
            torch.set_num_threads(threads)
        return
    inference = torch.is_inference_mode_enabled()
    local = threading.local()

    def begin() -> None:
        # Asking first initialises this thread's count; set before that, it would be overwritten at the first operation.
        torch.get_num_threads()
        torch.set_num_threads(threads // workers)
        local.work = Workspace(problem)

    def run_one(strip: list[Tile]) -> None:
        with torch.inference_mode() if inference else torch.no_grad():
            run(strip, local.work)

    try:
        with ThreadPoolExecutor(workers, initializer=begin) as pool:
            for done in [pool.submit(run_one, strip) for strip in strips]:
                done.result()
    finally:
        # A thread's own count is its own, but the default for threads yet to come is shared.
        torch.set_num_threads(threads)


def _run_here(run: Callable[[list[Tile], Workspace], None], strips: list[list[Tile]], problem: Problem) -> None:
    work = Workspace(problem)
    for strip in strips:
        run(strip, work)

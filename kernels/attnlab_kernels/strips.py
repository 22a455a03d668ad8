"""Runs strips of tiles on the processor's cores (backend `tiled`).

Each core works through strips of its own, with single-threaded operations. With every operation spread over all
cores instead, each of some thousand operations ends in a barrier, and whenever another process holds one core the rest
wait for a time slice: a call of 0.25 s then took 2 to 10. Strips write to separate places and sum in their own fixed
order, so the result does not depend on which core ran what.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import torch

from attnlab_kernels.problem import Problem
from attnlab_kernels.tiles import ENOUGH_STRIPS, Tile
from attnlab_kernels.workspace import Workspace

WORTH_THREADS = 1 << 27
"""Products of numbers, and keys and values read, below which more than one core costs more than it saves."""

A_READ = 8
"""Products that take as long as to read a number of k or v."""


LEAST_QUERIES = 64
"""Queries from which on keys may be copied for some of the heads that share them."""

MANY_QUERIES = 1024
"""Queries from which on a product with keys that lie side by side spares more time than it takes to turn them over."""


class _OwnThreads:
    """How many threads torch had before any of the calls that are under way, in whatever thread.

    Each thread has a count of its own, but it begins as the count that was set last, wherever that was: asked in the
    middle of another call, it would be that call's, and would stay behind.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = 0
        self._count = 0

    @contextmanager
    def put_back(self) -> Iterator[int]:
        """Gives the count, which the block may change."""
        with self._lock:
            if not self._calls:
                self._count = torch.get_num_threads()
            self._calls += 1
            count = self._count
        try:
            yield count
        finally:
            with self._lock:
                self._calls -= 1
                torch.set_num_threads(count)


_own_threads = _OwnThreads()


def worth_threads(problem: Problem) -> bool:
    """Whether a problem is large enough for several cores."""
    scores, read = problem.heads * problem.queries * problem.keys, problem.key_heads * problem.keys
    widths = problem.q.shape[-1] + problem.v.shape[-1]
    return problem.batch * (scores + A_READ * read) * widths >= WORTH_THREADS


def prepared(problem: Problem) -> Problem:
    """The problem with keys and values in its precision, laid out for batched products.

    A copy where the caller's layout is another, and where few key heads are shared by many: strips are of key heads,
    and of too few of them some cores would get none. Of few queries the copies would cost more than that spares.
    """
    k, v = (tensor.to(problem.dtype) for tensor in (problem.k, problem.v))
    strips = problem.batch * problem.key_heads
    if 0 < strips < ENOUGH_STRIPS and problem.queries >= LEAST_QUERIES and worth_threads(problem):
        fitting = [n for n in range(1, problem.group + 1) if problem.group % n == 0 and n * strips <= 2 * ENOUGH_STRIPS]
        copies = next((n for n in fitting if n * strips >= ENOUGH_STRIPS), fitting[-1])
        k, v = (tensor.repeat_interleave(copies, 1) if copies > 1 else tensor for tensor in (k, v))
    k = k.contiguous()
    if problem.queries >= MANY_QUERIES:
        k = k.mT.contiguous().mT
    return replace(problem, k=k, v=v.contiguous())


def run_strips(run: Callable[[list[Tile], Workspace], None], strips: list[list[Tile]], problem: Problem) -> None:
    """Call `run` once for each strip, with a workspace that no other thread uses at the time."""
    if problem.q.device.type != "cpu":
        _run_here(run, strips, Workspace(problem))
        return
    with _own_threads.put_back() as threads:
        small = not worth_threads(problem)
        if small:
            torch.set_num_threads(1)
        if small or min(threads, len(strips)) < 2:
            with _flushed_denormals(small or threads == 1) as flushes:
                work = Workspace(problem, flushes)
                _run_here(run, strips, work)
                work.release()
        else:
            _run_on_cores(run, strips, problem, threads)


def _run_on_cores(
    run: Callable[[list[Tile], Workspace], None], strips: list[list[Tile]], problem: Problem, threads: int
) -> None:
    workers = min(threads, len(strips))
    local, works = threading.local(), []

    def begin() -> None:
        # Asking first initialises this thread's count; set before that, it would be overwritten at the first operation.
        torch.get_num_threads()
        torch.set_num_threads(threads // workers)
        local.work = Workspace(problem, flushes=threads // workers == 1 and torch.set_flush_denormal(True))
        works.append(local.work)

    def run_one(strip: list[Tile]) -> None:
        _run_here(run, [strip], local.work)

    with ThreadPoolExecutor(workers, initializer=begin) as pool:
        try:
            for done in [pool.submit(run_one, strip) for strip in strips]:
                done.result()
        except BaseException:
            # An error or interrupt ends the call with the strips that have begun.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for work in works:
        work.release()


def _run_here(run: Callable[[list[Tile], Workspace], None], strips: list[list[Tile]], work: Workspace) -> None:
    # What a strip makes stays in it, and views that need no history are made faster.
    with torch.inference_mode():
        for strip in strips:
            run(strip, work)


@contextmanager
def _flushed_denormals(alone: bool) -> Iterator[bool]:
    """Count numbers too small to be normal as zero for a while, and say whether that is so.

    An operation that makes or meets one takes ten to a hundred times as long, and in a softmax they mean nothing.
    It can be had for this thread only: not where operations are spread over several, so `alone` says whether they are.
    """
    if not alone:
        yield False
        return
    # In Python's own numbers: a tensor would be of whatever type and device are the caller's default.
    before = sys.float_info.min / 2 == 0
    try:
        yield torch.set_flush_denormal(True)
    finally:
        torch.set_flush_denormal(before)

"""Calls leave torch's number of threads as it was, and end early where one of their strips fails."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import attnlab_kernels.strips
import pytest
import torch
from attnlab_kernels.resolve import resolve_problem
from attnlab_kernels.strips import run_strips
from attnlab_kernels.tiles import plan_strips


def test_a_call_that_begins_inside_another_and_outlives_it_leaves_the_number_of_threads() -> None:
    problem = resolve_problem(*torch.randn(3, 1, 2, 16, 8))
    strips = plan_strips(problem)[:1]
    inner_began, outer_ended = threading.Event(), threading.Event()

    def inner(strip: object, work: object) -> None:
        inner_began.set()
        assert outer_ended.wait(10)

    later = threading.Thread(target=run_strips, args=(inner, strips, problem))

    def outer(strip: object, work: object) -> None:
        later.start()
        assert inner_began.wait(10)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run_strips(outer, strips, problem)
        outer_ended.set()
        later.join()
        with ThreadPoolExecutor(1) as new:
            assert new.submit(torch.get_num_threads).result() == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_strips_that_have_not_begun_are_left_out_after_an_error(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attnlab_kernels.strips, "WORTH_THREADS", 1)
    problem = resolve_problem(*torch.randn(3, 1, 60, 128, 8))
    strip = plan_strips(problem)[0]
    begun = []

    def run(strip: object, work: object) -> None:
        assert threading.current_thread() is not threading.main_thread()
        begun.append(strip)
        if len(begun) == 1:
            raise error
        time.sleep(0.01)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(error):
            run_strips(run, [strip] * 100, problem)
        assert len(begun) < 50
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

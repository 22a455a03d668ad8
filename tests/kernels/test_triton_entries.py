"""Entries, largest entries and products of heads by the triton kernels, against the dense computation in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attnlab_kernels import Emit, Emitted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from attnlab_kernels.gpu import gram
from attnlab_kernels.gpu.arguments import kernel_inputs
from attnlab_kernels.gpu.configs import Launch
from attnlab_kernels.gpu.entries import Rectangle, launch_rectangle, run_entries
from attnlab_kernels.gpu.gram import run_head_gram
from attnlab_kernels.gpu.launch_forward import Rows, run_forward
from attnlab_kernels.gpu.top_k import MAX_LIST, run_top_k
from attnlab_kernels.problem import Problem
from attnlab_kernels.request import Request, resolve_request
from attnlab_kernels.resolve import resolve_problem

from .error_bound import (
    INDICES,
    assert_as_exact_as_dense,
    assert_points_at_as_large,
    flat,
    pattern,
    poisoned_memory,
    run,
)
from .strategies import DEVICE, Case, cases

INTERPRETED = DEVICE == "cpu"
NAMES = ("gather", "rows", "columns", "top_k", "head_gram")
SMALL = Launch(16, 16, 4, 1)


def case_of(b: int, h: int, n_q: int, n_k: int, emit: Emit, d: int = 16, **options: Any) -> Case:
    torch.manual_seed(0)
    q, k, v = (torch.randn(b, heads, n, d, device=DEVICE) for heads, n in ((h, n_q), (1, n_k), (1, n_k)))
    return Case((2 * q, k, v), options, emit)


def resolved(case: Case) -> tuple[Problem, Request, Rows]:
    problem, request = resolve_request(case.emit, resolve_problem(*case.qkv, **case.options))
    rows = run_forward(problem, request, True).rows
    assert rows is not None
    return problem, request, rows


def by_kernels(case: Case, launch: Launch | None = None, buffer_bytes: int = gram.BUFFER_BYTES) -> dict[str, Tensor]:
    """What these kernels find of a call, in poisoned memory; `launch` is for the largest entries."""
    problem, request, rows = resolved(case)
    with poisoned_memory():
        found = run_entries(problem, request, rows)
        if case.emit.top_k is not None:
            found |= run_top_k(problem, request, rows, launch)
        if case.emit.head_gram:
            found |= run_head_gram(problem, request, rows, buffer_bytes=buffer_bytes)
    return found


def assert_right(case: Case, found: dict[str, Tensor]) -> None:
    high = case.to(torch.float64)
    dense, exact = flat(run(case, "dense")[1]), flat(run(high, "dense")[1])
    assert found.keys() == exact.keys() - {"learned_sink_mass"}
    for name, value in found.items():
        if name in INDICES:
            assert_points_at_as_large(value, exact[name], pattern(case), pattern(high))
        else:
            assert value.dtype == torch.float32
            assert_as_exact_as_dense(value, dense[name], exact[name], name)


@settings(max_examples=12 if INTERPRETED else 200, deadline=None)
@given(cases(sizes=(1, 3, 16, 33, 50), statistics=NAMES))
def test_drawn_problems_in_single_precision(case: Case) -> None:
    low = case.to(torch.float32)
    assert_right(low, by_kernels(low, SMALL, 2**16))


@settings(max_examples=8 if INTERPRETED else 200, deadline=None)
@given(cases(sizes=(1, 3, 16, 33, 50), statistics=NAMES))
def test_drawn_problems_in_half_precision(case: Case) -> None:
    low = case.to(torch.float16)
    assert_right(low, by_kernels(low))


def index(*numbers: int) -> Tensor:
    return torch.tensor(numbers, device=DEVICE)


def test_an_index_of_minus_one_reads_zero_in_any_place() -> None:
    every = torch.full((1, 20, 17), -1, device=DEVICE)
    every[:, :, ::3] = 4
    case = case_of(1, 2, 20, 30, Emit(gather=every, rows=index(-1, 3, -1), columns=index(7, -1)), causal=True)
    found = by_kernels(case)
    assert_right(case, found)
    assert (found["gathered"][..., 1] == 0).all()
    assert (found["rows"][:, :, [0, 2]] == 0).all()
    assert (found["columns"][..., 1] == 0).all()


def test_no_index_at_all_gives_empty_tensors() -> None:
    none = torch.empty(1, 0, dtype=torch.int64, device=DEVICE)
    case = case_of(1, 2, 5, 6, Emit(gather=none[:, None].expand(1, 5, 0), rows=none, columns=none))
    found = by_kernels(case)
    assert [tuple(found[name].shape) for name in ("gathered", "rows", "columns")] == [
        (1, 2, 5, 0), (1, 2, 0, 6), (1, 2, 5, 0),
    ]  # fmt: skip


def test_indices_may_repeat_and_differ_between_batch_rows() -> None:
    emit = Emit(
        gather=torch.randint(-1, 40, (2, 33, 18), device=DEVICE),
        rows=torch.randint(-1, 33, (2, 20), device=DEVICE),
        columns=torch.randint(-1, 40, (2, 35), device=DEVICE),
    )
    case = case_of(2, 3, 33, 40, emit, causal=True, window=12, sinks=torch.randn(3, device=DEVICE))
    assert_right(case, by_kernels(case))


@pytest.mark.parametrize("launch", [SMALL, Launch(32, 64, 4, 1), Launch(128, 16, 8, 1), Launch(128, 128, 8, 1)])
def test_every_element_of_a_rectangle_is_written_whatever_the_tile(launch: Launch) -> None:
    case = case_of(2, 2, 50, 37, Emit(rows=torch.arange(50, device=DEVICE)), causal=True)
    problem, _, rows = resolved(case)
    out = torch.full((2, 2, 70, 48), torch.nan, device=DEVICE)
    launch_rectangle(kernel_inputs(problem), rows, Rectangle(None, None, 10, 3, 70, 48), out, launch=launch)
    low, exact = pattern(case), pattern(case.to(torch.float64))
    assert_as_exact_as_dense(out[:, :, :40, :34], low[:, :, 10:, 3:], exact[:, :, 10:, 3:])
    assert (out[:, :, 40:] == 0).all()
    assert (out[..., 34:] == 0).all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"causal": True, "prefix": index(20)},
        {"causal": True, "segments": (torch.arange(50, device=DEVICE) // 20)[None]},
        {"causal": True, "window": 20, "first_tokens": 3},
        {"normalizer": "sigmoid"},
    ],
    ids=lambda options: " ".join(options) or "all visible",
)
def test_of_equal_logits_the_first_keys_are_the_largest(options: dict[str, Any]) -> None:
    q, k, v = torch.zeros(1, 1, 50, 16), torch.randn(1, 1, 50, 16), torch.randn(1, 1, 50, 16)
    # Zeros of both signs, and a few logits of 1 and -1.
    k[..., 0] = torch.where(torch.arange(50) % 7 == 0, 1.0, torch.where(torch.arange(50) % 5 == 0, -1.0, 0.0))
    q[..., 0] = torch.where(torch.arange(50) % 2 == 0, 1.0, -1.0)[None, None]
    case = Case(tuple(t.to(DEVICE) for t in (q, k, v)), {**options, "scale": 1.0}, Emit(top_k=9))
    got = by_kernels(case, SMALL)
    exact = run(case.to(torch.float64), "dense")[1]
    assert exact.top_k_keys is not None
    assert torch.equal(got["top_k_keys"], exact.top_k_keys)
    assert_right(case, got)


@pytest.mark.parametrize("k", [1, 2, 5, MAX_LIST, MAX_LIST + 1, 80, 100])
def test_any_number_of_largest_entries(k: int) -> None:
    case = case_of(1, 1, 20, 80, Emit(top_k=k), causal=True, query_offset=55)
    got = by_kernels(case)
    assert_right(case, got)
    assert (got["top_k_values"].diff(dim=-1) <= 0).all()
    seen = torch.arange(56, 76, device=DEVICE)[:, None]
    assert torch.equal(got["top_k_keys"][0, 0] >= 0, torch.arange(k, device=DEVICE) < seen)


def test_more_are_asked_for_than_a_row_sees() -> None:
    case = case_of(1, 2, 40, 20, Emit(top_k=7), causal=True)
    got = by_kernels(case, SMALL)
    assert_right(case, got)
    empty = got["top_k_keys"][:, :, :20]
    assert (empty == -1).all()
    assert (got["top_k_values"][:, :, :20] == 0).all()


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_logits_that_rise_or_fall_along_the_keys(order: str) -> None:
    # Rising, every tile replaces the whole list; falling, none but the first is looked at.
    q, k = torch.ones(1, 1, 33, 16), torch.linspace(-1, 1, 70)[None, None, :, None].expand(1, 1, 70, 16)
    case = Case((q.to(DEVICE), (k if order == "rising" else -k).to(DEVICE), k.to(DEVICE)), {}, Emit(top_k=8))
    got = by_kernels(case, SMALL)
    assert_right(case, got)
    wanted = torch.arange(69, 61, -1) if order == "rising" else torch.arange(8)
    assert torch.equal(got["top_k_keys"], wanted.to(DEVICE).expand(1, 1, 33, 8))


def test_values_of_the_largest_entries_leave_out_a_learned_sink() -> None:
    sinks = torch.tensor([3.0, -2.0], device=DEVICE)
    case = case_of(1, 2, 20, 20, Emit(top_k=20), causal=True, sinks=sinks)
    got = by_kernels(case, SMALL)
    assert_right(case, got)
    emitted: Emitted = run(case.to(torch.float64), "dense")[1]
    assert emitted.learned_sink_mass is not None
    torch.testing.assert_close(got["top_k_values"].double().sum(-1), 1 - emitted.learned_sink_mass)


@pytest.mark.parametrize("buffer_bytes", [1, 2**15, gram.BUFFER_BYTES])
@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"causal": True, "window": 9, "first_tokens": 20}, {"window": 5}, {"normalizer": "sigmoid"}],
    ids=" ".join,
)
def test_products_of_heads_do_not_depend_on_the_size_of_the_buffer(options: dict[str, Any], buffer_bytes: int) -> None:
    case = case_of(2, 3, 50, 70, Emit(head_gram=True), **options)
    found = by_kernels(case, buffer_bytes=buffer_bytes)
    assert_right(case, found)
    assert torch.equal(found["head_gram"], found["head_gram"].mT)


def test_more_heads_than_a_tile_holds() -> None:
    case = case_of(1, 35, 16, 16, Emit(head_gram=True))
    problem, request, rows = resolved(case)
    with poisoned_memory():
        found = run_head_gram(problem, request, rows, Launch(16, 64, 4, 1))
    assert_right(case, found)


def test_a_query_that_does_not_count_adds_nothing_to_products_of_heads_whatever_it_holds() -> None:
    counts = torch.tensor([[True] * 20, [True] * 7 + [False] * 13], device=DEVICE)
    clean = case_of(2, 2, 20, 20, Emit(head_gram=True), causal=True, query_mask=counts)
    for normalizer in ("softmax", "sigmoid"):
        case = clean._replace(options={**clean.options, "normalizer": normalizer})
        q = case.qkv[0].masked_fill(~counts[:, None, :, None], torch.nan)
        spoilt = by_kernels(case._replace(qkv=(q, *case.qkv[1:])))
        assert torch.equal(spoilt["head_gram"], by_kernels(case)["head_gram"])
        assert_right(case, spoilt)


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(st.integers(1, 200), st.integers(1, 200), st.integers(-100, 100)),
    st.tuples(st.booleans(), st.sampled_from([None, 1, 9, 60]), st.integers(0, 40), st.booleans()),
    st.sampled_from([1, 600, 3000, 10**6]),
)
def test_blocks_hold_every_visible_entry_once(sizes: Any, options: Any, entries: int) -> None:
    (n_q, n_k, offset), (causal, window, first_tokens, prefix) = sizes, options
    q, k = torch.empty(1, 1, n_q, 1), torch.empty(1, 1, n_k, 1)
    named = {"causal": causal, "window": window, "first_tokens": first_tokens, "query_offset": offset}
    problem = resolve_problem(q, k, k, **named, prefix=torch.tensor([n_k // 2]) if prefix else None)
    held = torch.zeros(n_q + 16, n_k + 16)
    for block in gram._blocks(problem, entries):
        assert block.queries % 16 == block.keys % 16 == 0
        assert block.queries * block.keys <= max(entries, 256)
        last_query, last_key = block.first_query + block.queries, block.first_key + block.keys
        held[block.first_query : last_query, block.first_key : last_key] += 1
    assert held.max() <= 1
    assert (held[:n_q, :n_k][problem.visible_float()[0, 0] > 0] == 1).all()

"""The second pass of the triton backend against the dense computation: what sums over queries.

Every launch runs with small tiles, so that a few positions take several of them, in memory that held NaN.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attnlab_kernels import Emit, RelativeBias
from attnlab_kernels.dense import dense_attention
from attnlab_kernels.emit import Emitted
from attnlab_kernels.request import resolve_request
from attnlab_kernels.resolve import resolve_problem
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from attnlab_kernels.gpu.configs import Launch
from attnlab_kernels.gpu.launch_forward import run_forward
from attnlab_kernels.gpu.launch_statistics import run_statistics

from .error_bound import COUNTS, assert_as_exact_as_dense, flat, poisoned_memory
from .strategies import DEVICE, Case, cases

STATISTICS = ("key_sum", "key_square", "key_max", "query_probes", "pool", "offsets")
TILES = [Launch(16, 16, 4, 1), Launch(32, 16, 4, 1), Launch(16, 32, 4, 1)]
SQUARE = TILES[0]


def second_pass(case: Case, launch: Launch = SQUARE, parts: int | None = None) -> dict[str, torch.Tensor]:
    """What the kernels find, by name, those of a tuple with a number behind it."""
    problem, request = resolve_request(case.emit, resolve_problem(*case.qkv, **case.options))
    with poisoned_memory():
        rows = run_forward(problem, resolve_request(Emit(), problem)[1], True, SQUARE).rows
        assert rows is not None
        return flat(Emitted(**run_statistics(problem, request, rows, launch, parts)))


def dense(case: Case) -> dict[str, torch.Tensor]:
    problem, request = resolve_request(case.emit, resolve_problem(*case.qkv, **case.options))
    found = flat(dense_attention(problem, request)[1])
    return {name: value for name, value in found.items() if name != "learned_sink_mass"}


def assert_as_exact(
    case: Case, dtype: torch.dtype = torch.float32, launch: Launch = SQUARE, parts: int | None = None
) -> None:
    low = case.to(dtype)
    got, rounded, exact = second_pass(low, launch, parts), dense(low), dense(low.to(torch.float64))
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert value.dtype == torch.float32, name
        if name.split()[0] in COUNTS:
            assert torch.equal(value, exact[name].float()), name
        else:
            assert_as_exact_as_dense(value, rounded[name], exact[name], name)


def problem_of(n_q: int, n_k: int, emit: Emit, b: int = 2, h: int = 2, n: int = 1, d: int = 8, **options: Any) -> Case:
    torch.manual_seed(0)
    q, k, v = (torch.randn(b, *s, d, dtype=torch.float64, device=DEVICE) for s in ((h, n_q), (n, n_k), (n, n_k)))
    return Case((q * 2, k, v), options, emit)


def every_statistic(n_q: int) -> Emit:
    probes = torch.randn(n_q, 3, dtype=torch.float64, device=DEVICE)
    edges = ([-60, -5, 0, 1, 2, 4, 8, 16, 32, 64], [0, 2])
    return Emit(key_sum=True, key_square=True, key_max=True, query_probes=probes, pool=(16, 7), offsets=edges)


def options_named(name: str, n_q: int, n_k: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def holds(*shape: int) -> torch.Tensor:
        return (torch.rand(*shape, generator=generator) < 0.7).to(DEVICE)

    bias = torch.randn(2, 1, n_k, generator=generator, dtype=torch.float64).to(DEVICE)
    return {
        "full": {},
        "causal": {"causal": True},
        "window": {"window": 20},
        "window and first tokens": {"causal": True, "window": 9, "first_tokens": 3},
        "prefix": {"causal": True, "prefix": torch.tensor([5, 30], device=DEVICE)},
        "documents": {"segments": (torch.arange(n_q, device=DEVICE).expand(2, -1) // 20,
                                   torch.arange(n_k, device=DEVICE).expand(2, -1) // 20)},
        "padding keys": {"key_mask": holds(2, n_k)},
        "padding queries": {"causal": True, "query_mask": holds(2, n_q)},
        "mask": {"mask": holds(2, 2, n_q, n_k)},
        "bias that hides": {"bias": bias.masked_fill(~holds(2, 1, n_k), -torch.inf)},
        "bias and padding queries": {"bias": bias, "query_mask": holds(2, n_q)},
        "slopes and buckets": {"alibi": torch.rand(2, generator=generator).to(DEVICE),
                               "relative_bias": RelativeBias(bias[:, 0, :8].T.contiguous())},
        "softcap and sinks": {"softcap": 2.0, "sinks": bias[:, 0, 0]},
        "sigmoid": {"normalizer": "sigmoid", "sigmoid_bias": -1.0, "query_mask": holds(2, n_q)},
    }[name]  # fmt: skip


MASKS = ["full", "causal", "window", "window and first tokens", "prefix", "documents", "padding keys",
         "padding queries", "mask", "bias that hides", "bias and padding queries", "slopes and buckets",
         "softcap and sinks", "sigmoid"]  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_every_statistic_is_as_exact_as_a_dense_computation(name: str) -> None:
    n_q, n_k = 20, 37
    assert_as_exact(problem_of(n_q, n_k, every_statistic(n_q), **options_named(name, n_q, n_k)))


@settings(max_examples=8, deadline=None)
@given(cases(sizes=(1, 3, 16, 20), statistics=STATISTICS), st.sampled_from(TILES), st.sampled_from([None, 2, 3]))
def test_drawn_problems_are_as_exact_as_a_dense_computation(case: Case, launch: Launch, parts: int | None) -> None:
    assert_as_exact(case, launch=launch, parts=parts)


@pytest.mark.parametrize("dtype", [torch.float16])
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    assert_as_exact(problem_of(33, 33, every_statistic(33), b=1, causal=True), dtype)


@pytest.mark.parametrize("size", [1, 3, 7, 12, 16, 20, 33, 48, 100])
def test_a_block_of_any_size_is_pooled(size: int) -> None:
    for launch in TILES[1:]:
        assert_as_exact(problem_of(40, 37, Emit(pool=size), b=1, h=1, causal=True), launch=launch)


@pytest.mark.parametrize("name", ["causal", "window and first tokens", "documents", "padding queries", "sigmoid"])
def test_single_distances_are_told_apart(name: str) -> None:
    n_q, n_k = 20, 37
    emit = Emit(offsets=(list(range(-40, 40)), [0, 1, 5]))
    assert_as_exact(problem_of(n_q, n_k, emit, **options_named(name, n_q, n_k)))


@pytest.mark.parametrize("edges", [[0, 1], [-(10**12), 10**12], list(range(-3, 60)), list(range(-3, 61)), [500, 600]])
def test_bins_may_be_few_or_many_and_reach_beyond_all_distances(edges: list[int]) -> None:
    assert_as_exact(problem_of(20, 20, Emit(offsets=edges), b=1, h=1))


def test_more_probes_than_one_launch_takes() -> None:
    probes = torch.randn(2, 1, 20, 130, dtype=torch.float64, device=DEVICE)
    assert_as_exact(problem_of(20, 20, Emit(key_sum=True, query_probes=probes), causal=True))


@pytest.mark.parametrize("columns", [0, 1])
def test_probes_of_few_columns(columns: int) -> None:
    probes = torch.randn(20, columns, dtype=torch.float64, device=DEVICE)
    assert_as_exact(problem_of(20, 20, Emit(query_probes=probes), causal=True))


@pytest.mark.parametrize(("n_q", "n_k"), [(0, 5), (5, 0), (1, 1)])
def test_no_queries_or_no_keys(n_q: int, n_k: int) -> None:
    assert_as_exact(problem_of(n_q, n_k, every_statistic(n_q)))


def test_padding_queries_may_hold_anything() -> None:
    counts = torch.arange(33, device=DEVICE) % 3 > 0
    case = problem_of(33, 33, every_statistic(33), b=1, h=1, causal=True, query_mask=counts[None]).to(torch.float32)
    bias = torch.zeros(1, 1, 33, 1, device=DEVICE)
    case = case._replace(options=case.options | {"bias": bias})
    clean = second_pass(case)
    q = case.qkv[0].masked_fill(~counts[:, None], torch.nan)
    dirty = case._replace(qkv=(q, *case.qkv[1:]))
    dirty = dirty._replace(options=dirty.options | {"bias": bias.masked_fill(~counts[:, None], torch.nan)})
    for name, value in second_pass(dirty).items():
        assert torch.equal(value, clean[name]), name


@pytest.mark.parametrize("parts", [1, 3])
def test_two_runs_give_the_same_bytes(parts: int) -> None:
    case = problem_of(33, 33, every_statistic(33), b=1, h=1, causal=True, window=20).to(torch.float32)
    first, second = second_pass(case, parts=parts), second_pass(case, parts=parts)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_logits_of_a_hundred_thousand_keep_each_row_normalised() -> None:
    # Small integers, so that products are exact in whatever order they are summed. Exponents are not, where fma is
    # not fused, as in the interpreter; but both passes round them alike.
    torch.manual_seed(0)
    q, k, v = torch.randint(-3, 4, (3, 1, 1, 33, 8), device=DEVICE).float()
    options = {"scale": 0.25, "bias": torch.full((1, 1, 1, 1), 1e5, device=DEVICE)}
    found = second_pass(Case((q, k, v), options, Emit(key_sum=True, pool=40, offsets=[-100, 100])))
    total = 33.0
    for of_rows in (found["key_sum"].double().sum(), found["pooled"].double().sum() * 33 * 33, found["offsets"].sum()):
        assert abs(float(of_rows) - total) <= 16 * torch.finfo(torch.float32).eps * total


def test_tensors_need_not_be_contiguous() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 30, 2, 16, dtype=torch.float64, device=DEVICE)
    swapped = tuple(t.transpose(1, 2)[..., ::2] for t in (q, k, v))
    assert_as_exact(Case(swapped, {"causal": True}, every_statistic(30)))  # type: ignore[arg-type]

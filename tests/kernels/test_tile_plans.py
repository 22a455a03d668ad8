"""Which tiles the kernels visit, against the boolean matrix: each that holds something once, and none that is empty."""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from attnlab_kernels.gpu.arguments import kernel_inputs  # noqa: E402
from attnlab_kernels.gpu.schedule import make_schedules  # noqa: E402
from attnlab_kernels.gpu.tiles import key_tile, plan_keys, plan_queries, query_tile  # noqa: E402
from attnlab_kernels.problem import Problem  # noqa: E402
from attnlab_kernels.resolve import resolve_problem  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import Tensor  # noqa: E402

from .strategies import DEVICE  # noqa: E402

B, H = 2, 2


@triton.jit
def list_keys(x, schedule, out, counts, W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    i_m, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = i_bh // x.heads, i_bh % x.heads
    full, every, h0, h1, w0, w1, w2 = plan_keys(x, schedule, i_b, i_h, i_m, BLOCK_M, BLOCK_N)
    row = i_bh * tl.num_programs(0) + i_m
    tl.store(counts + row * 2, full)
    tl.store(counts + row * 2 + 1, every)
    for t in range(full):
        tl.store(out + row * W + t, key_tile(t, schedule, i_b, i_h, i_m, full, h0, h1, w0, w1, w2, True))
    for t in range(full, every):
        tl.store(out + row * W + t, key_tile(t, schedule, i_b, i_h, i_m, full, h0, h1, w0, w1, w2, False))


@triton.jit
def list_queries(x, schedule, out, counts, W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    i_n, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = i_bh // x.heads, i_bh % x.heads
    full, every, low, clear_low = plan_queries(x, schedule, i_b, i_h, i_n, BLOCK_M, BLOCK_N)
    row = i_bh * tl.num_programs(0) + i_n
    tl.store(counts + row * 2, full)
    tl.store(counts + row * 2 + 1, every)
    for t in range(full):
        tl.store(out + row * W + t, query_tile(t, schedule, i_b, i_h, i_n, full, low, clear_low, True))
    for t in range(full, every):
        tl.store(out + row * W + t, query_tile(t, schedule, i_b, i_h, i_n, full, low, clear_low, False))


def planned(problem: Problem, block_m: int, block_n: int, over_keys: bool) -> tuple[Tensor, Tensor]:
    """[B, H, tiles of queries, tiles of keys] twice: which tiles are visited, and which of them as full ones."""
    tiles = -(-problem.queries // block_m), -(-problem.keys // block_n)
    rows, width = tiles if over_keys else tiles[::-1]
    schedules = make_schedules(problem, block_m, block_n)
    schedule = schedules.over_keys if over_keys else schedules.over_queries
    listed = torch.full((B * H, rows, width + 1), -1, device=DEVICE)
    counts = torch.full((B * H, rows, 2), -1, device=DEVICE)
    kernel = list_keys if over_keys else list_queries
    kernel[(rows, B * H)](kernel_inputs(problem), schedule, listed, counts, width + 1, block_m, block_n)
    assert (counts[..., 0] <= counts[..., 1]).all()
    assert (counts[..., 1] <= width).all()
    place = torch.arange(width, device=DEVICE)
    visited, full = torch.zeros(2, B * H, rows, width, dtype=torch.long, device=DEVICE)
    for until, seen in ((counts[..., 1:], visited), (counts[..., :1], full)):
        here = place < until
        seen.scatter_add_(-1, listed[..., :width].clamp(min=0), here.long())
        assert (listed[..., :width][here] >= 0).all()
    assert visited.max() <= 1, "a tile is visited twice"
    shaped = (t.bool().view(B, H, rows, width) for t in (visited, full))
    return tuple(t if over_keys else t.mT for t in shaped)  # type: ignore[return-value]


def by_brute_force(problem: Problem, block_m: int, block_n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which tiles hold something visible, which hold nothing else, and which lie inside the matrix."""
    shape = (B, H, problem.queries, problem.keys)
    visible = problem.visible()
    seen = torch.ones(shape, device=DEVICE) if visible is None else visible.expand(shape).float()
    rows, columns = -problem.queries % block_m, -problem.keys % block_n
    counts = torch.nn.functional.pad(seen, (0, columns, 0, rows)).unflatten(-1, (-1, block_n))
    counts = counts.unflatten(2, (-1, block_m)).sum((3, 5))
    exists = torch.nn.functional.pad(torch.ones_like(seen), (0, columns, 0, rows)).unflatten(-1, (-1, block_n))
    exists = exists.unflatten(2, (-1, block_m)).sum((3, 5))
    return counts > 0, counts == exists, exists == block_m * block_n


def check(n_q: int, n_k: int, block_m: int, block_n: int, options: dict[str, Any], exactly: bool) -> None:
    q, k = torch.zeros(B, H, n_q, 4, device=DEVICE), torch.zeros(B, 1, n_k, 4, device=DEVICE)
    problem = resolve_problem(q, k, k, **options)
    some, every, whole = by_brute_force(problem, block_m, block_n)
    for over_keys in (True, False):
        visited, full = planned(problem, block_m, block_n, over_keys)
        assert not (some & ~visited).any(), "a tile that holds visible entries is left out"
        assert not (full & ~every).any(), "a tile with hidden entries counts as full"
        if not over_keys:
            # Sums over a full tile need no mask.
            assert not (full & ~whole).any()
        if exactly:
            assert torch.equal(visited, some), "an empty tile is visited"


@st.composite
def masks(draw: st.DrawFn) -> tuple[int, int, int, int, dict[str, Any]]:
    n_q, n_k = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    options: dict[str, Any] = {"causal": draw(st.booleans())}
    options |= draw(st.fixed_dictionaries({}, optional={
        "window": st.integers(1, 40), "first_tokens": st.integers(0, 30), "query_offset": st.integers(-80, 80),
    }))  # fmt: skip
    listed = {
        "prefix": lambda: torch.randint(0, n_k + 1, (B,), device=DEVICE),
        "segments": lambda: tuple(torch.randint(0, 3, (B, n), device=DEVICE).sort(1).values for n in (n_q, n_k)),
        "key_mask": lambda: torch.rand(B, n_k, device=DEVICE) < 0.8,
        "mask": lambda: torch.rand(B, draw(st.sampled_from([1, H])), n_q, n_k, device=DEVICE) < 0.9,
    }
    options |= {name: listed[name]() for name in draw(st.lists(st.sampled_from(sorted(listed)), max_size=1))}
    block = st.sampled_from([8, 16])
    return n_q, n_k, draw(block), draw(block), options


@settings(max_examples=40, deadline=None)
@given(masks())
def test_every_visible_entry_is_in_a_tile_that_is_visited_once(drawn: Any) -> None:
    check(*drawn, exactly=False)


def lengths(*numbers: int) -> Tensor:
    return torch.arange(70, device=DEVICE) < torch.tensor(numbers, device=DEVICE)[:, None]


def documents(*sizes: int) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).expand(B, -1).to(DEVICE)


MASKS: dict[str, dict[str, Any]] = {
    "everything": {},
    "causal": {"causal": True},
    "causal, into a cache": {"causal": True, "query_offset": 30},
    "causal, empty rows": {"causal": True, "query_offset": -30},
    "window": {"causal": True, "window": 11},
    "two-sided window": {"window": 11},
    "window that ends before the queries": {"window": 4, "query_offset": 20},
    "two-sided window that begins after them": {"window": 7, "query_offset": -30},
    "window and first tokens": {"causal": True, "window": 9, "first_tokens": 4},
    "two-sided window and first tokens": {"window": 9, "first_tokens": 20},
    "prefix": {"causal": True, "prefix": torch.tensor([0, 37], device=DEVICE)},
    "packed documents": {"causal": True, "segments": documents(20, 1, 32, 17)},
    "documents seen both ways": {"segments": documents(16, 16, 38)},
    "keys of different lengths": {"causal": True, "key_mask": lengths(70, 23)},
    "keys padded on the left": {"key_mask": ~lengths(30, 1)},
    "any boolean mask": {"mask": torch.ones(70, 70, device=DEVICE).tril(-20).bool()[None, None]},
}


@pytest.mark.parametrize("blocks", [(8, 16), (16, 8)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_a_tile_that_the_mask_empties_is_skipped(name: str, blocks: tuple[int, int]) -> None:
    check(70, 70, *blocks, MASKS[name], exactly=True)


def test_the_full_tiles_of_a_mask_are_in_the_loop_without_masks() -> None:
    q = torch.zeros(B, H, 64, 4, device=DEVICE)
    for options in (MASKS["causal"], MASKS["two-sided window"] | {"window": 40}, MASKS["everything"]):
        problem = resolve_problem(q, q, q, **options)
        _, every, whole = by_brute_force(problem, 16, 16)
        for over_keys in (True, False):
            assert torch.equal(planned(problem, 16, 16, over_keys)[1], every & whole)

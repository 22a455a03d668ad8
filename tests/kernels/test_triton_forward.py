"""What only the triton backend has: keys split over programs, offsets past 2^31 elements, tiles of any size."""

from __future__ import annotations

import mmap
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from attnlab_kernels import Emit, Emitted, attention
from attnlab_kernels.gpu.architecture import architecture_of
from attnlab_kernels.gpu.configs import (
    FORWARD,
    FORWARD_FLOAT32,
    FORWARD_WITH_PROBES,
    Launch,
    choose_parts,
    forward_launches,
)
from attnlab_kernels.gpu.launch_forward import run_forward
from attnlab_kernels.request import resolve_request
from attnlab_kernels.resolve import resolve_problem

from .error_bound import assert_is_right, assert_keeps_the_contract, flat, poisoned_memory, run
from .strategies import DEVICE, ROW_STATISTICS, STATISTICS, Case, every

ROWS = (*ROW_STATISTICS, "key_probes")
PAST_INT32 = 2**31 + 64
MAP_NORESERVE = 0x4000  # of Linux; in Python's mmap from 3.13 on


def case_of(b: int, h: int, n_q: int, n_k: int, names: tuple[str, ...] = ROWS, **options: Any) -> Case:
    torch.manual_seed(0)
    q, k, v = (torch.randn(b, h, n, 16, dtype=torch.float64, device=DEVICE) for n in (n_q, n_k, n_k))
    return Case((2 * q, k, v), options, every(names, b, n_q, n_k))


def forward(case: Case, launch: Launch | None = None, parts: int | None = None) -> tuple[torch.Tensor, Emitted]:
    problem, request = resolve_request(case.emit, resolve_problem(*case.qkv, **case.options))
    with poisoned_memory():
        out, found, rows = run_forward(problem, request, True, launch, parts)
    assert rows is not None
    assert rows.pivot.isfinite().all()
    assert rows.log_z.isfinite().all()
    return out, Emitted(**found)


SPLIT = {
    "one query": (1, 90, {"causal": True}),
    "a tile and a bit": (19, 90, {"causal": True}),
    "rows that see no key": (40, 23, {"causal": True}),
    "a learned sink": (5, 90, {"sinks": torch.ones(1, device=DEVICE)}),
    "sigmoid": (5, 90, {"normalizer": "sigmoid"}),
    "window and first tokens": (20, 90, {"causal": True, "window": 20, "first_tokens": 3}),
    "documents": (40, 40, {"segments": (torch.arange(40, device=DEVICE) // 14)[None], "causal": True}),
    "parts that see nothing": (3, 90, {"key_mask": (torch.arange(90, device=DEVICE) >= 70)[None]}),
}


@pytest.mark.parametrize("parts", [2, 9])
@pytest.mark.parametrize("name", SPLIT)
def test_keys_split_over_programs_give_the_same_statistics(name: str, parts: int) -> None:
    n_q, n_k, options = SPLIT[name]
    case = case_of(1, 1, n_q, n_k, **options).to(torch.float32)
    assert_is_right(case, *forward(case, Launch(16, 16, 4, 1), parts))


def test_decoding_over_a_long_cache_splits_the_keys_by_shapes_alone() -> None:
    launch = forward_launches(architecture_of(torch.empty(0, device=DEVICE)), 16, 16, torch.float16.itemsize)[0]
    n_k = 8 * launch.block_n + 5
    assert choose_parts(2, -(-n_k // launch.block_n)) > 1
    case = case_of(1, 2, 1, n_k, names=("lse", "entropy", "max_probability", "collision", "visible"), causal=True)
    assert_keeps_the_contract(case, "triton", torch.float16)
    first, second = run(case.to(torch.float16), "triton"), run(case.to(torch.float16), "triton")
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1].entropy, second[1].entropy)


def test_a_prompt_is_not_split() -> None:
    assert choose_parts(16 * 32, 64) == 1


def configurations() -> list[Launch]:
    """Every configuration of the tables; in the interpreter, where warps and stages are nothing, each size of tile."""
    if DEVICE == "cuda":
        here = architecture_of(torch.empty(0, device=DEVICE))
        return [*{*forward_launches(here, 16, 16, 2), *forward_launches(here, 16, 16, 2, probes=2)}]
    tables = [choices for family in FORWARD.values() for choices in family.values()]
    tables += [*FORWARD_WITH_PROBES.values(), *FORWARD_FLOAT32.values()]
    return [*{launch[:2]: launch for choices in tables for launch in choices}.values()]


@pytest.mark.parametrize("launch", configurations(), ids=str)
def test_every_configuration_of_the_tables_gives_the_same_statistics(launch: Launch) -> None:
    case = case_of(1, 1, 50, 70, causal=True, window=40, first_tokens=2)
    case = case.to(torch.float32 if DEVICE == "cpu" else torch.float16)
    assert_is_right(case, *forward(case, launch))


@pytest.mark.parametrize("columns", [0, 1, 127, 128, 129, 300])
def test_there_may_be_any_number_of_probe_columns(columns: int) -> None:
    case = case_of(1, 1, 20, 33, causal=True).to(torch.float32)
    probes = torch.randn(33, columns, device=DEVICE)
    case = case._replace(emit=replace(case.emit, key_probes=probes))
    assert_is_right(case, *forward(case))


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Half-precision numbers, 2^31 of them before the middle and twice as many behind it, so that an offset that wraps
    around reads a wrong number and not somebody else's memory. The system backs only the pages that are touched.
    """
    numbers = 3 * PAST_INT32
    if DEVICE == "cuda":
        if torch.cuda.mem_get_info()[0] < 3 * numbers:
            pytest.skip("too little memory on the GPU")
        return torch.empty(numbers, dtype=torch.float16, device=DEVICE)
    # The interpreter copies every storage back onto itself, which would touch all of it.
    copy = torch.UntypedStorage.copy_

    def copy_unless_the_same(to: Any, source: Any, *rest: Any) -> Any:
        return to if to.data_ptr() == source.data_ptr() else copy(to, source, *rest)

    monkeypatch.setattr(torch.UntypedStorage, "copy_", copy_unless_the_same)
    pages = mmap.mmap(-1, 2 * numbers, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.frombuffer(pages, dtype=torch.float16)


# Each stride fits 32 bits, so that it is the product with a place which does not.
APART = 2**30 + 64
FAR = {
    "batch rows": ((4, 1, 20, 16), (APART, 20 * 16, 16, 1)),
    "heads": ((1, 4, 20, 16), (20 * 16, APART, 16, 1)),
    "positions": ((1, 1, 20, 16), (16, 32, PAST_INT32 // 10, 1)),
}


@pytest.mark.parametrize("name", FAR)
def test_offsets_may_pass_two_to_the_thirty_first_element(name: str, storage: torch.Tensor) -> None:
    shape, stride = FAR[name]
    b, _, n, _ = shape
    q, k, v = torch.randn(3, *shape, device=DEVICE).half()
    far = torch.as_strided(storage, shape, stride, PAST_INT32)
    assert sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) > 2**31
    plain = Case((q, k, v), {"causal": True}, every(STATISTICS, b, n, n)).to(torch.float16)
    want, expected = run(plain, "triton")
    for place in range(3):
        qkv = [q, k, v]
        far.copy_(qkv[place])
        qkv[place] = far
        got, found = attention(*qkv, causal=True, emit=plain.emit, backend="triton")
        assert torch.equal(got, want)
        for statistic, value in flat(found).items():
            assert torch.equal(value, flat(expected)[statistic]), statistic


@pytest.mark.parametrize("option", ["mask", "bias"])
@pytest.mark.parametrize("name", FAR)
def test_numbers_of_entries_may_pass_two_to_the_thirty_first_element(
    name: str, option: str, storage: torch.Tensor
) -> None:
    (b, h, n, d), stride = FAR[name]
    q, k, v = torch.randn(3, b, h, n, d, device=DEVICE).half()
    numbers = torch.randn(b, h, n, n, device=DEVICE).half()
    if option == "mask":
        numbers, storage = numbers > -0.5, storage.view(torch.bool)
    # Rows of n keys instead of d columns.
    stride = tuple(step if step > 2**26 else {20 * 16: n * n, 16: n, 32: n * n, 1: 1}[step] for step in stride)
    far = torch.as_strided(storage, numbers.shape, stride, PAST_INT32)
    far.copy_(numbers)
    emit = Emit(entropy=True, visible=True, key_sum=True)
    got, found = attention(q, k, v, **{option: far}, emit=emit, backend="triton")
    want, expected = attention(q, k, v, **{option: numbers}, emit=emit, backend="triton")
    assert torch.equal(got, want)
    for statistic, value in flat(found).items():
        assert torch.equal(value, flat(expected)[statistic]), statistic

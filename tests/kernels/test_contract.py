"""Every backend keeps one contract: drawn problems, then shapes and options that have caught kernels out, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from attnlab_kernels import RelativeBias
from hypothesis import given, settings
from torch import Tensor

from .error_bound import assert_keeps_the_contract, flat, run
from .strategies import DEVICE, STATISTICS, Case, cases, every

INTERPRETED = DEVICE == "cpu"
HALF = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
SMALL_TILES = 300
BACKENDS = pytest.mark.parametrize("backend", ["tiled", "triton"])


@settings(max_examples=40, deadline=None)
@given(cases(statistics=STATISTICS))
def test_tiled_on_drawn_problems_in_single_precision(case: Case) -> None:
    assert_keeps_the_contract(case, "tiled", torch.float32, SMALL_TILES)


@settings(max_examples=20, deadline=None)
@given(cases(statistics=STATISTICS))
def test_tiled_on_drawn_problems_in_half_precision(case: Case) -> None:
    assert_keeps_the_contract(case, "tiled", torch.float16, SMALL_TILES)


@settings(max_examples=20 if INTERPRETED else 200, deadline=None)
@given(cases())
def test_triton_on_drawn_problems_in_single_precision(case: Case) -> None:
    assert_keeps_the_contract(case, "triton", torch.float32)


@pytest.mark.parametrize("dtype", HALF)
@settings(max_examples=20 if INTERPRETED else 200, deadline=None)
@given(case=cases())
def test_triton_on_drawn_problems_in_half_precision(case: Case, dtype: torch.dtype) -> None:
    assert_keeps_the_contract(case, "triton", dtype)


class Shape(NamedTuple):
    """Sizes of a problem."""

    b: int = 1
    h: int = 2
    n: int = 1
    n_q: int = 33
    n_k: int = 33
    d: int = 16
    dv: int = 16


def case_of(shape: Shape, make: Callable[[Shape], dict[str, Any]] | None = None) -> Case:
    """A problem of a shape with every statistic."""
    torch.manual_seed(0)
    b, h, n, n_q, n_k, d, dv = shape
    double = {"dtype": torch.float64, "device": DEVICE}
    q, k, v = (torch.randn(*s, **double) for s in ((b, h, n_q, d), (b, n, n_k, d), (b, n, n_k, dv)))
    return Case((2 * q, k, v), {} if make is None else make(shape), every(STATISTICS, b, n_q, n_k))


def causal(_: Shape) -> dict[str, Any]:
    return {"causal": True}


def lengths(shape: Shape, *numbers: int) -> Tensor:
    """[b, n_k], True before each row's length."""
    return torch.arange(shape.n_k, device=DEVICE) < torch.tensor(numbers, device=DEVICE)[:, None]


def documents(*sizes: int) -> Tensor:
    """Ids of documents packed one after the other, [1, their sum]."""
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[None].to(DEVICE)


def bias_with_holes(s: Shape) -> Tensor:
    bias = torch.randn(s.b, s.h, s.n_q, s.n_k, dtype=torch.float64, device=DEVICE)
    return bias.masked_fill(torch.rand_like(bias) < 0.3, -torch.inf)


def per_head(s: Shape, *numbers: float) -> Tensor:
    return torch.tensor(numbers[: s.h], dtype=torch.float64, device=DEVICE)


def t5(s: Shape, bidirectional: bool) -> RelativeBias:
    return RelativeBias(torch.randn(32, s.h, dtype=torch.float64, device=DEVICE), bidirectional, 40)


SHAPES = {
    **{f"length {n}": (Shape(n_q=n, n_k=n, h=1), causal) for n in (1, 63, 111, 127, 129)},
    "more keys than queries": (Shape(n_q=33, n_k=129), causal),
    "more queries than keys, so empty rows": (Shape(n_q=129, n_k=33), causal),
    "one query": (Shape(n_q=1, n_k=77), causal),
    "one key": (Shape(n_q=77, n_k=1), None),
    **{
        f"{d} columns, values of {dv}": (Shape(d=d, dv=dv, n_q=17, n_k=33), causal)
        for d, dv in (
            *((8, 16), (16, 8), (32, 64), (64, 32), (72, 80), (80, 72), (96, 128), (128, 96), (192, 256), (256, 192)),
            *((64, 64), (128, 128), (1, 1)),
        )
    },
    "groups of 1": (Shape(h=8, n=8, n_q=9, n_k=9), causal),
    "groups of 4": (Shape(h=8, n=2, n_q=9, n_k=9), causal),
    "groups of 8": (Shape(h=16, n=2, n_q=9, n_k=9), causal),
    "one group of all": (Shape(h=8, n=1, n_q=9, n_k=9), causal),
}

OPTIONS = {
    "everything visible": (Shape(), None),
    "keys of different lengths": (Shape(b=3, h=1), lambda s: {"causal": True, "key_mask": lengths(s, 33, 16, 1)}),
    "keys padded on the left": (Shape(b=2, h=1), lambda s: {"causal": True, "key_mask": ~lengths(s, 5, 20)}),
    "packed documents": (Shape(n_q=40, n_k=40), lambda s: {"causal": True, "segments": documents(10, 1, 21, 8)}),
    "documents seen both ways": (Shape(n_q=40, n_k=40), lambda s: {"segments": documents(16, 16, 8)}),
    "queries that do not count": (Shape(b=2, h=1), lambda s: {"query_mask": lengths(s, 33, 7)}),
    "no query counts": (Shape(), lambda s: {"causal": True, "query_mask": lengths(s, 0)}),
    "one-sided window": (Shape(n_q=40, n_k=40), lambda s: {"causal": True, "window": 17}),
    "two-sided window": (Shape(n_q=40, n_k=40), lambda s: {"window": 17}),
    "window and first tokens": (Shape(n_q=50, n_k=50), lambda s: {"causal": True, "window": 9, "first_tokens": 4}),
    "two-sided window and first tokens": (Shape(n_q=40, n_k=40), lambda s: {"window": 9, "first_tokens": 17}),
    "prefix": (Shape(b=2, h=1), lambda s: {"causal": True, "prefix": torch.tensor([0, 20], device=DEVICE)}),
    "soft cap": (Shape(), lambda s: {"causal": True, "softcap": 1.5}),
    "bias with holes": (Shape(), lambda s: {"bias": bias_with_holes(s)}),
    "bias of one row": (Shape(b=2, h=1), lambda s: {"bias": bias_with_holes(s)[:1, :1, :1], "causal": True}),
    "bias of one column": (Shape(b=2, h=1), lambda s: {"bias": bias_with_holes(s)[:, :1, :, :1], "causal": True}),
    "mask for each head": (Shape(), lambda s: {"mask": bias_with_holes(s) > -1}),
    "slopes": (Shape(), lambda s: {"causal": True, "alibi": per_head(s, 0.5, 0.1)}),
    "T5's buckets, encoder": (Shape(n_q=40, n_k=40), lambda s: {"relative_bias": t5(s, True), "scale": 1.0}),
    "T5's buckets, decoder": (Shape(n_q=40, n_k=40), lambda s: {"relative_bias": t5(s, False), "causal": True}),
    "learned sinks": (Shape(), lambda s: {"causal": True, "sinks": per_head(s, 3.0, -8.0)}),
    "learned sinks above every logit": (Shape(), lambda s: {"window": 5, "sinks": per_head(s, 60.0, 90.0)}),
    "sigmoid": (Shape(), lambda s: {"normalizer": "sigmoid", "sigmoid_bias": per_head(s, -3.0, 1.0)}),
    "sigmoid and window": (Shape(), lambda s: {"normalizer": "sigmoid", "causal": True, "window": 9}),
    "a scale of 0": (Shape(), lambda s: {"scale": 0.0, "causal": True}),
    "a negative scale": (Shape(), lambda s: {"scale": -0.7, "causal": True}),
    "far from the diagonal": (Shape(), lambda s: {"causal": True, "query_offset": 500}),
    "before the first key": (Shape(), lambda s: {"causal": True, "query_offset": -20}),
}


@BACKENDS
@pytest.mark.parametrize("name", SHAPES)
def test_a_shape(name: str, backend: str) -> None:
    # Half precision has the larger tiles, of which shapes fall short, and the wider loads.
    assert_keeps_the_contract(case_of(*SHAPES[name]), backend, torch.float16)


@BACKENDS
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option(name: str, backend: str) -> None:
    assert_keeps_the_contract(case_of(*OPTIONS[name]), backend, torch.float32)


@BACKENDS
def test_a_thousand_positions(backend: str) -> None:
    shape = Shape(h=1, n_q=1000, n_k=1000, d=8, dv=8)
    case = case_of(shape, lambda s: {"causal": True, "window": 150, "first_tokens": 3})
    names = ("lse", "entropy", "argmax", "visible", "key_sum", "key_max", "pool", "offsets", "columns")
    assert_keeps_the_contract(case._replace(emit=every(names, 1, 1000, 1000, pool=64)), backend, torch.float16)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads after positions": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "columns before positions": lambda t: t.mT.contiguous().mT,
    "every other column": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "every other position": lambda t: t.repeat_interleave(2, -2)[..., ::2, :],
    "inside a larger tensor": lambda t: torch.nn.functional.pad(t, (3, 5, 2, 1, 1, 0))[:, 1:, 2:-1, 3:-5],
    "one head expanded": lambda t: t[:, :1].expand(t.shape),
    "one position expanded": lambda t: t[:, :, :1].expand(t.shape),
}


@BACKENDS
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_in_memory_gives_the_bytes_of_a_contiguous_one(name: str, backend: str) -> None:
    case = case_of(Shape(b=2, h=2, n=2, n_q=20, n_k=30), causal).to(torch.float16)
    bias = torch.randn(2, 2, 20, 30, device=DEVICE).half()
    strided = Case(tuple(LAYOUTS[name](t) for t in case.qkv), {"bias": LAYOUTS[name](bias)}, case.emit)
    plain = Case(tuple(t.contiguous() for t in strided.qkv), {"bias": strided.options["bias"].contiguous()}, case.emit)
    assert any(not t.is_contiguous() for t in strided.qkv)
    if backend == "triton":
        assert_same_bytes(run(strided, backend), run(plain, backend))
    else:
        assert_keeps_the_contract(strided, backend, torch.float16)


@BACKENDS
def test_two_runs_give_the_same_bytes(backend: str) -> None:
    shape = Shape(b=2, h=4, n=2, n_q=40, n_k=40)
    case = case_of(shape, lambda s: {"causal": True, "sinks": per_head(s, 1.0, 2.0, 0.0, -1.0)}).to(torch.float32)
    assert_same_bytes(run(case, backend), run(case, backend))


def assert_same_bytes(first: tuple[Tensor, Any], second: tuple[Tensor, Any]) -> None:
    assert torch.equal(first[0], second[0])
    one, other = flat(first[1]), flat(second[1])
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name

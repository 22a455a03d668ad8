"""Gradients of the triton backend against those of the dense one in float64, of every learned tensor.

The bound on an error is twice that of the dense computation in the same precision, plus a few roundings. Memory that
the kernels allocate reads NaN until it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from attnlab_kernels import Emit, RelativeBias
from attnlab_kernels.dense import dense_attention
from attnlab_kernels.gpu.configs import Launch
from attnlab_kernels.gpu.launch_backward import Kept, run_backward
from attnlab_kernels.gpu.launch_forward import run_forward
from attnlab_kernels.gradients import ResultGradients
from attnlab_kernels.operator import compute
from attnlab_kernels.problem import Problem
from attnlab_kernels.request import Request, resolve_request
from attnlab_kernels.resolve import resolve_problem
from torch import Tensor

from .error_bound import poisoned_memory
from .strategies import DEVICE, cast

B, H, N, QUERIES, KEYS, D, DV = 2, 4, 2, 19, 25, 16, 24
SMALL = Launch(16, 16, 4, 1)
EVERY = ("out", "lse", "entropy", "key_probes")


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def holds(*shape: int) -> Tensor:
    return torch.rand(shape, device=DEVICE) < 0.7


def t5(buckets: int, bidirectional: bool) -> RelativeBias:
    return RelativeBias(draw(buckets, H), bidirectional, 20)


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "everything visible": dict,
    "causal, with empty rows": lambda: {"causal": True, "query_offset": -3},
    "window and first tokens": lambda: {"causal": True, "window": 7, "first_tokens": 2},
    "two-sided window": lambda: {"window": 7},
    "prefix": lambda: {"causal": True, "prefix": torch.tensor([5, 0], device=DEVICE)},
    "documents": lambda: {"segments": tuple(torch.randint(0, 3, (B, n), device=DEVICE) for n in (QUERIES, KEYS))},
    "padding": lambda: {"key_mask": holds(B, KEYS), "query_mask": holds(B, QUERIES)},
    "mask": lambda: {"mask": holds(B, H, QUERIES, KEYS)},
    "softcap": lambda: {"softcap": 1.5, "scale": -0.8},
    "whole bias": lambda: {"bias": draw(B, H, QUERIES, KEYS), "causal": True},
    "bias that heads share": lambda: {"bias": draw(B, 1, QUERIES, KEYS)},
    "bias that all share": lambda: {"bias": draw(QUERIES, KEYS).masked_fill(~holds(QUERIES, KEYS), -torch.inf)},
    "bias of keys": lambda: {"bias": draw(H, 1, KEYS), "causal": True},
    "bias of queries": lambda: {"bias": draw(B, 1, QUERIES, 1)},
    "one number": lambda: {"bias": draw(1)},
    "slopes": lambda: {"alibi": draw(H)},
    "buckets both ways": lambda: {"relative_bias": t5(32, True)},
    "buckets before the query": lambda: {"relative_bias": t5(8, False)},
    "sinks": lambda: {"sinks": draw(H), "causal": True, "query_offset": -3},
    "a sink that is nothing": lambda: {"sinks": torch.tensor([-torch.inf, 0.0, 3.0, 60.0], device=DEVICE)},
    "sigmoid": lambda: {"normalizer": "sigmoid", "sigmoid_bias": draw(H), "causal": True, "query_offset": -3},
    "sigmoid, bent": lambda: {"normalizer": "sigmoid", "softcap": 2.0, "alibi": draw(H), "bias": draw(H, 1, KEYS)},
}


def problem_of(options: dict[str, Any], probes: Tensor, dtype: torch.dtype) -> tuple[Problem, Request]:
    """A problem in a precision; its keys and values are those that the mask left."""
    torch.manual_seed(1)
    qkv = [t.to(torch.float16).to(dtype) for t in (draw(B, H, QUERIES, D), draw(B, N, KEYS, D), draw(B, N, KEYS, DV))]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    options = {name: cast(value, wide) for name, value in options.items()}
    emit = Emit(lse=True, entropy=True, key_probes=probes.to(wide))
    return resolve_request(emit, resolve_problem(*qkv, **options))


def by_autograd(problem: Problem, request: Request, above: ResultGradients) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in problem.learned().items()}
    out, found = dense_attention(problem.with_learned(leaves), request)
    results = (out, found.lse, found.entropy, found.key_probes)
    pairs = [(r, g.to(r.dtype)) for r, g in zip(results, above, strict=True) if g is not None and r is not None]
    grads = torch.autograd.grad(
        [r for r, _ in pairs],
        list(leaves.values()),
        # The lse of a row that sees no key is a constant.
        [torch.where(r.isinf(), 0, g) for r, g in pairs],
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(leaves, grads, strict=True))


def assert_gradients_are_right(
    options: dict[str, Any],
    reached: tuple[str, ...] = EVERY,
    dtype: torch.dtype = torch.float32,
    probes: Tensor | None = None,
    launch: Launch | None = SMALL,
    parts: int | None = None,
) -> None:
    probes = draw(KEYS, 3) if probes is None else probes
    shapes = {"out": (B, H, QUERIES, DV), "key_probes": (B, H, QUERIES, probes.shape[-1])}
    above = ResultGradients(**{name: draw(*shapes.get(name, (B, H, QUERIES))) for name in reached})
    if above.out is not None:
        above = above._replace(out=above.out.to(dtype))
    problem, request = problem_of(options, probes, dtype)
    with poisoned_memory():
        forward = run_forward(problem, request, True, launch)
        assert forward.rows is not None
        kept = Kept(forward.rows, forward.out, forward.found["entropy"], forward.found["key_probes"])
        given = above
        if above.lse is not None:
            given = above._replace(lse=torch.where(forward.found["lse"].isinf(), torch.nan, above.lse))
        found = run_backward(problem, kept, given, list(problem.learned()), launch, parts)
    exact = by_autograd(*problem_of(options, probes, torch.float64), above)
    dense = by_autograd(problem, request, above)
    for name, gradient in found.items():
        right = exact[name]
        assert gradient.shape == right.shape, name
        assert gradient.dtype == problem.learned()[name].dtype, name
        error, allowed = (gradient.double() - right).abs().max(), 2 * (dense[name].double() - right).abs().max()
        # The output, from which delta is, and the tiles that meet keys and values are in the inputs' precision.
        floor = 16 * torch.finfo(dtype).eps * max(1.0, float(right.abs().max()))
        assert error <= allowed + floor, f"{name} is off by {error:.2e}, at most {allowed + floor:.2e} is allowed"


@pytest.mark.parametrize("name", OPTIONS)
def test_every_gradient_through_every_result(name: str) -> None:
    torch.manual_seed(0)
    assert_gradients_are_right(OPTIONS[name]())


@pytest.mark.parametrize("reached", [("out",), ("lse",), ("entropy",), ("key_probes",), ("lse", "key_probes")])
@pytest.mark.parametrize("name", ["causal, with empty rows", "sinks", "sigmoid"])
def test_gradients_through_some_results(name: str, reached: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    assert_gradients_are_right(OPTIONS[name](), reached)


@pytest.mark.parametrize("name", ["everything visible", "sinks", "sigmoid", "whole bias"])
def test_half_precision(name: str) -> None:
    torch.manual_seed(0)
    assert_gradients_are_right(OPTIONS[name](), dtype=torch.float16)


def test_the_tiles_of_the_table() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16):
        assert_gradients_are_right({"causal": True, "bias": draw(QUERIES, KEYS)}, dtype=dtype, launch=None)


@pytest.mark.parametrize("shape", [(B, KEYS, 3), (B, H, KEYS, 3), (B, 1, KEYS, 3), (1, H, KEYS, 3), (KEYS, 70)])
def test_probes_of_any_shape_and_width(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    assert_gradients_are_right({"causal": True, "sinks": draw(H)}, probes=draw(*shape))


def test_heads_of_a_group_spread_over_programs() -> None:
    torch.manual_seed(0)
    for probes in (draw(KEYS, 3), draw(B, H, KEYS, 3)):
        assert_gradients_are_right({"causal": True, "bias": draw(H, 1, KEYS)}, probes=probes, parts=2)


def test_only_what_is_needed_is_computed_and_what_nothing_reaches_is_zero() -> None:
    problem, request = problem_of({"causal": True}, draw(KEYS, 3), torch.float32)
    forward = run_forward(problem, request, True, SMALL)
    assert forward.rows is not None
    above = ResultGradients(lse=draw(B, H, QUERIES))
    found = run_backward(problem, Kept(forward.rows), above, ("v", "k"), SMALL)
    assert found.keys() == {"v", "k"}
    assert not found["v"].any()
    assert found["k"].any()


def test_two_runs_give_the_same_bytes_in_any_layout() -> None:
    torch.manual_seed(0)
    problem, request = problem_of({"causal": True, "relative_bias": t5(8, True)}, draw(KEYS, 3), torch.float32)
    above = draw(B, QUERIES, DV, H)

    def gradients(out: Tensor) -> tuple[Tensor, ...]:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in problem.learned().items()}
        result, _ = compute(problem.with_learned(leaves), request, "triton")
        return torch.autograd.grad(result, list(leaves.values()), out, materialize_grads=True)

    strided = gradients(above.permute(0, 3, 1, 2))
    for first, second in zip(strided, gradients(above.permute(0, 3, 1, 2).contiguous()), strict=True):
        assert torch.equal(first, second)


def test_problems_without_queries_or_keys_have_gradients_of_zero() -> None:
    for n_q, n_k in ((0, 3), (3, 0)):
        q, k, v = (torch.randn(1, 2, n, 8, device=DEVICE, requires_grad=True) for n in (n_q, n_k, n_k))
        sinks = torch.zeros(2, device=DEVICE, requires_grad=True)
        problem, request = resolve_request(Emit(lse=True), resolve_problem(q, k, v, sinks=sinks))
        out, found = compute(problem, request, "triton")
        grads = torch.autograd.grad(out.sum() + found.lse.sum(), (q, k, v, sinks))
        assert not any(grad.any() for grad in grads[:3])
        assert torch.equal(grads[3], torch.full((2,), float(n_q), device=DEVICE))

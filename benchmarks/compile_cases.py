"""What `compile_kernels.py` compiles: each case is a call of a launcher with tensors that have shapes and no memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from attnlab_kernels import Emit
from attnlab_kernels.gpu.entries import run_entries
from attnlab_kernels.gpu.gram import run_head_gram
from attnlab_kernels.gpu.launch_backward import Kept, run_backward
from attnlab_kernels.gpu.launch_forward import Rows, run_forward
from attnlab_kernels.gpu.launch_products import run_products
from attnlab_kernels.gpu.launch_statistics import run_statistics
from attnlab_kernels.gpu.top_k import run_top_k
from attnlab_kernels.gradients import ResultGradients
from attnlab_kernels.problem import Problem
from attnlab_kernels.product_request import ProductRequest
from attnlab_kernels.request import Request
from torch import Tensor

BATCH, HEADS, KEY_HEADS, LENGTH = 2, 32, 8, 4096
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHORT = 512
"""Length where a launcher cuts the pattern into blocks: every block compiles the same kernels."""

ROWS = {"lse": True, "entropy": True, "max_probability": True}
EMITTED: dict[str, dict[str, Any]] = {
    "off": {},
    "entropy": {"entropy": True, "lse": True},
    "entropy, collision": {"entropy": True, "lse": True, "collision": True},
    "rows": ROWS,
    "collision": ROWS | {"collision": True},
    "argmax": ROWS | {"argmax": True},
    "all": ROWS | {"collision": True, "argmax": True, "visible": True},
    "16 probes": ROWS | {"key_probes": 16},
    "all, 16 probes": ROWS | {"collision": True, "argmax": True, "key_probes": 16},
    "64 probes": ROWS | {"key_probes": 64},
}


class Case(NamedTuple):
    """A kernel's name, what it emits or computes, columns of a head, and an option of the pattern."""

    kernel: str
    variant: str
    target: str
    dtype: str
    d: int
    option: str = "causal"


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def problem_of(case: Case, length: int = LENGTH) -> Problem:
    dtype = DTYPES[case.dtype]
    options: dict[str, dict[str, Any]] = {
        "causal": {},
        "full": {"causal": False},
        "window": {"window": 512, "first_tokens": 4},
        "key mask": {"key_mask": empty(BATCH, length, dtype=torch.bool)},
        "mask by head": {"mask": empty(BATCH, HEADS, length, length, dtype=torch.bool)},
        "bias": {"bias": empty(1, HEADS, length, length, dtype=dtype)},
        "alibi": {"alibi": empty(HEADS)},
        "softcap": {"softcap": 30.0},
        "sigmoid": {"normalizer": "sigmoid", "sigmoid_bias": empty(HEADS)},
        "sinks": {"sinks": empty(HEADS)},
        "mask, padding queries, sinks": {
            "mask": empty(BATCH, HEADS, length, length, dtype=torch.bool),
            "query_mask": empty(BATCH, length, dtype=torch.bool),
            "sinks": empty(HEADS),
        },
    }
    return Problem(
        q=empty(BATCH, HEADS, length, case.d, dtype=dtype),
        k=empty(BATCH, KEY_HEADS, length, case.d, dtype=dtype),
        v=empty(BATCH, KEY_HEADS, length, case.d, dtype=dtype),
        scale=case.d**-0.5,
        offset=0,
        **({"causal": True} | options[case.option]),
    )


def _forward(case: Case) -> None:
    emitted = dict(EMITTED[case.variant.removesuffix(", split")])
    problem = problem_of(case)
    if "key_probes" in emitted:
        probes = empty(1, 1, LENGTH, emitted.pop("key_probes"))
        problem = Problem(**(vars(problem) | {"key_probes": probes}))
    parts = 4 if case.variant.endswith("split") else 1
    run_forward(problem, Request(emit=Emit(**emitted)), keep_rows=True, parts=parts)


def _rows(length: int) -> Rows:
    return Rows(empty(BATCH, HEADS, length), empty(BATCH, HEADS, length))


def _statistics(case: Case) -> None:
    request = {
        "key sums": lambda: Request(emit=Emit(key_sum=True)),
        "key sums, pool": lambda: Request(emit=Emit(key_sum=True), pools=(64,)),
        "squares, maxima": lambda: Request(emit=Emit(key_sum=True, key_square=True, key_max=True)),
        "16 probes": lambda: Request(emit=Emit(), query_probes=empty(1, 1, LENGTH, 16)),
        "offsets": lambda: Request(emit=Emit(key_sum=True), edges=(empty(14, dtype=torch.int64),)),
        "exact offsets": lambda: Request(emit=Emit(), edges=(empty(513, dtype=torch.int64),)),
    }[case.variant]()
    run_statistics(problem_of(case), request, _rows(LENGTH))


def _entries(case: Case) -> None:
    index = {"gather": (BATCH, LENGTH, 4), "rows": (BATCH, 64), "columns": (BATCH, 3)}
    request = Request(emit=Emit(), **{name: empty(*shape, dtype=torch.int64) for name, shape in index.items()})
    run_entries(problem_of(case), request, _rows(LENGTH))


def _top_k(case: Case) -> None:
    run_top_k(problem_of(case), Request(emit=Emit(top_k=int(case.variant))), _rows(LENGTH))


def _gram(case: Case) -> None:
    run_head_gram(problem_of(case, SHORT), Request(emit=Emit(head_gram=True)), _rows(SHORT))


def _backward(case: Case) -> None:
    problem = problem_of(case)
    row, out = empty(BATCH, HEADS, LENGTH), empty(*problem.q.shape, dtype=problem.q.dtype)
    kept, grads = Kept(_rows(LENGTH), out, row), ResultGradients(out, row, row)
    if case.variant == "16 probes":
        problem = Problem(**(vars(problem) | {"key_probes": empty(1, 1, LENGTH, 16)}))
        found = empty(BATCH, HEADS, LENGTH, 16)
        kept, grads = kept._replace(key_probes=found), grads._replace(key_probes=found)
    run_backward(problem, kept, grads, set(problem.learned()))


def _products(case: Case) -> None:
    problem = problem_of(case)
    function = "loss_change" if case.variant == "loss change" else "relevance"
    vectors = empty(1, 1, LENGTH, 16)
    request = ProductRequest(function, pools=(64,), several_pools=False, right=vectors, left=vectors)
    run_products(problem, empty(*problem.q.shape, dtype=problem.q.dtype), request)


LAUNCH: dict[str, Callable[[Case], None]] = {
    "forward": _forward,
    "statistics": _statistics,
    "entries": _entries,
    "top-k": _top_k,
    "head Gram": _gram,
    "backward": _backward,
    "gradient products": _products,
}


def _all_cases() -> list[Case]:
    targets = ("sm_80", "sm_90", "sm_100", "gfx942")
    found = [Case("forward", emitted, "sm_90", "bf16", d) for d in (64, 128) for emitted in list(EMITTED)[:8]]
    for option in ("full", "window", "key mask", "mask by head", "bias", "alibi", "softcap", "sigmoid", "sinks"):
        found.append(Case("forward", "all", "sm_90", "bf16", 128, option))
    found += [Case("forward", "all", "sm_90", "fp16", d) for d in (16, 96, 256)]
    found.append(Case("forward", "64 probes", "sm_90", "bf16", 128))
    found.append(Case("forward", "all, split", "sm_90", "bf16", 128))
    for target in targets:
        if target != "sm_90":
            found += [Case("forward", emitted, target, "bf16", d) for d in (64, 128) for emitted in ("off", "all")]
            found += [
                Case("forward", "all, 16 probes", target, "bf16", 128),
                Case("forward", "all", target, "bf16", 256),
            ]
        found.append(Case("forward", "all", target, "fp32", 128))
        found += [Case("backward", "all", target, "bf16", d) for d in ((64, 128) if target == "sm_90" else (128,))]
        found += [Case("statistics", "key sums, pool", target, "bf16", 128)]
        found += [Case(kernel, variant, target, "bf16", 64) for kernel, variant in (("entries", "-"), ("top-k", "8"))]
        found.append(Case("gradient products", "relevance", target, "bf16", 64))
    for variant in ("key sums", "squares, maxima", "16 probes", "offsets", "exact offsets"):
        found.append(Case("statistics", variant, "sm_90", "bf16", 64))
    found.append(Case("head Gram", "-", "sm_90", "bf16", 64))
    found.append(Case("backward", "16 probes", "sm_90", "bf16", 64))
    found.append(Case("gradient products", "loss change", "sm_90", "bf16", 128))
    found.append(Case("statistics", "squares, maxima", "sm_90", "fp32", 128))
    found.append(Case("backward", "all", "sm_90", "fp32", 128, "bias"))
    # What is constant stands within tuples in many places here: triton 3.6 loses some of it where a tuple ends wrongly.
    found.append(Case("statistics", "offsets", "sm_90", "bf16", 64, "key mask"))
    found.append(Case("forward", "all", "sm_90", "bf16", 128, "mask, padding queries, sinks"))
    return found


CASES = _all_cases()

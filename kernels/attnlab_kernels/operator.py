"""`attention` as custom operators of torch, `attnlab::attention` and `attnlab::attention_backward`.

One node each to `torch.compile`, `torch.export` and fake tensors, over the backends `triton` and `tiled`. Arguments are
flat: tensors, numbers, and the names of the statistics in one string. What comes back is a list: the output, those
statistics that carry gradients, the others in the order of `Emitted`, and, where a backward of `triton` will want
them, each row's normaliser. Importing this module registers the operators, which is why `attention` does it when it is
first called.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnlab_kernels.backends import choose_backend
from attnlab_kernels.emit import Emit, Emitted
from attnlab_kernels.gradients import DIFFERENTIABLE, ResultGradients
from attnlab_kernels.precision import on_device_of, without_autocast
from attnlab_kernels.problem import Problem, RelativeBias
from attnlab_kernels.request import Request, check_indices
from attnlab_kernels.resolve import values_can_be_read
from attnlab_kernels.tiled import tiled_attention
from attnlab_kernels.tiled_gradients import tiled_gradients
from attnlab_kernels.tiles import CACHE_SCORES

LEARNED = ("q", "k", "v", "key_probes", "bias", "alibi", "relative_bias", "sinks", "sigmoid_bias")
MASKS = ("prefix", "query_segments", "key_segments", "key_mask", "query_mask", "mask")
CHOSEN = ("query_probes", "gather", "rows", "columns")
FLAGS = tuple(f.name for f in fields(Emit) if f.type == "bool")

_PROBLEM = (
    ", ".join(("Tensor " if name in ("q", "k", "v") else "Tensor? ") + name for name in LEARNED)
    + "".join(f", Tensor? {name}" for name in MASKS)
    + ", float scale, bool causal, SymInt offset, SymInt? window, SymInt first_tokens, float? softcap, bool sigmoid"
    + ", bool bidirectional, SymInt max_distance"
)
_REQUEST = (
    ", str statistics"
    + "".join(f", Tensor? {name}" for name in CHOSEN)
    + ", Tensor[] edges, SymInt[] pools, SymInt? top_k, bool checked"
)
_KEPT = ("out", "entropy", "key_probes_read", "pivot", "log_z")
_LIBRARY = torch.library.Library("attnlab", "DEF")
_LIBRARY.define(f"attention({_PROBLEM}{_REQUEST}, str backend, SymInt scores, bool keep_rows) -> Tensor[]")
_LIBRARY.define(
    "attention_backward("
    + ", ".join(f"Tensor? d_{name}" for name in ResultGradients._fields)
    + "".join(f", Tensor? {name}" for name in _KEPT)
    + f", {_PROBLEM}, str needed, str backend, SymInt scores) -> Tensor[]"
)
_TENSORS = len(LEARNED) + len(MASKS)
_PROBLEM_ARGUMENTS = _TENSORS + 9


class Result(NamedTuple):
    """One tensor of an answer."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def compute(problem: Problem, request: Request, backend: str, scores: int = CACHE_SCORES) -> tuple[Tensor, Emitted]:
    """The output and the statistics, with gradients to everything learned.

    Args:
        problem: what to compute.
        request: the statistics asked for.
        backend: "auto", "triton" or "tiled".
        scores: how many entries of the pattern the tiled backend may hold at one time.
    """
    keep_rows = torch.is_grad_enabled() and any(t.requires_grad for t in problem.learned().values())
    results = torch.ops.attnlab.attention(*flat_problem(problem), *flat_request(request), backend, scores, keep_rows)
    found: dict[str, Any] = {}
    for (name, _, _), tensor in zip(result_tensors(problem, request), results, strict=False):
        found.setdefault(name, []).append(tensor)
    several = {"pooled": request.several_pools, "pooled_count": request.several_pools}
    several |= {"offsets": request.several_edges, "offset_count": request.several_edges}
    found = {name: tuple(tensors) if several.get(name, False) else tensors[0] for name, tensors in found.items()}
    return found.pop("out"), Emitted(**found)


def result_tensors(problem: Problem, request: Request) -> list[Result]:
    """Everything that a call returns, in the operator's order; each of several maps or profiles is one."""
    emit, real = request.emit, problem.dtype
    b, h, n_q, n_k = problem.batch, problem.heads, problem.queries, problem.keys
    found = [Result("out", (b, h, n_q, problem.v.shape[-1]), problem.q.dtype)]
    for name in ("lse", "entropy"):
        if getattr(emit, name):
            found.append(Result(name, (b, h, n_q), real))
    if problem.key_probes is not None:
        found.append(Result("key_probes", (b, h, n_q, problem.key_probes.shape[-1]), real))
    for name in ("max_probability", "argmax", "collision", "visible"):
        if getattr(emit, name):
            found.append(Result(name, (b, h, n_q), torch.int64 if name == "argmax" else real))
    if problem.sinks is not None:
        found.append(Result("learned_sink_mass", (b, h, n_q), real))
    if request.query_probes is not None:
        found.append(Result("query_probes", (b, h, n_k, request.query_probes.shape[-1]), real))
    if request.gather is not None:
        found.append(Result("gathered", (b, h, n_q, request.gather.shape[-1]), real))
    if request.rows is not None:
        found.append(Result("rows", (b, h, request.rows.shape[-1], n_k), real))
    if request.columns is not None:
        found.append(Result("columns", (b, h, n_q, request.columns.shape[-1]), real))
    for name in ("key_sum", "key_square", "key_max"):
        if getattr(emit, name):
            found.append(Result(name, (b, h, n_k), real))
    if request.key_statistics:
        found.append(Result("key_count", (b, h, n_k), real))
    for name in ("pooled", "pooled_count"):
        found += [Result(name, (b, h, -(-n_q // size), -(-n_k // size)), real) for size in request.pools]
    for name in ("offsets", "offset_count"):
        found += [Result(name, (b, h, edges.shape[0] - 1), real) for edges in request.edges]
    if emit.top_k is not None:
        found.append(Result("top_k_values", (b, h, n_q, emit.top_k), real))
        found.append(Result("top_k_keys", (b, h, n_q, emit.top_k), torch.int64))
    if emit.head_gram:
        found.append(Result("head_gram", (b, h, h), real))
    return found


def flat_problem(problem: Problem) -> tuple[Any, ...]:
    """The problem as the operators' first arguments."""
    relative = problem.relative_bias
    table, bidirectional, max_distance = (None, False, 0) if relative is None else relative
    p = problem
    return (
        *(p.q, p.k, p.v, p.key_probes, p.bias, p.alibi, table, p.sinks, p.sigmoid_bias),
        *(p.prefix, p.query_segments, p.key_segments, p.key_mask, p.query_mask, p.mask),
        *(p.scale, p.causal, p.offset, p.window, p.first_tokens, p.softcap, p.normalizer == "sigmoid"),
        *(bidirectional, max_distance),
    )


def _problem(flat: Sequence[Any]) -> Problem:
    tensors = dict(zip(LEARNED + MASKS, flat, strict=False))
    scale, causal, offset, window, first_tokens, softcap, sigmoid, bidirectional, max_distance = flat[len(tensors) :]
    table = tensors.pop("relative_bias")
    return Problem(
        **tensors,
        scale=scale,
        causal=causal,
        offset=offset,
        window=window,
        first_tokens=first_tokens,
        softcap=softcap,
        normalizer="sigmoid" if sigmoid else "softmax",
        relative_bias=None if table is None else RelativeBias(table, bidirectional, max_distance),
    )


def flat_request(request: Request) -> tuple[Any, ...]:
    """The request as the arguments of `attnlab::attention` that follow the problem."""
    statistics = ",".join([name for name in FLAGS if getattr(request.emit, name)])
    r = request
    chosen = (r.query_probes, r.gather, r.rows, r.columns)
    return statistics, *chosen, list(r.edges), list(r.pools), r.emit.top_k, r.checked


def _request(flat: Sequence[Any]) -> Request:
    statistics, query_probes, gather, rows, columns, edges, pools, top_k, checked = flat
    asked: dict[str, Any] = dict.fromkeys(statistics.split(",") if statistics else (), True)
    emit = Emit(**asked, top_k=top_k)
    # Always several of each here: what the caller gets is decided where the answer is put together.
    return Request(emit, query_probes, gather, rows, columns, tuple(pools), tuple(edges), True, True, checked)


def _read(arguments: Sequence[Any]) -> tuple[Problem, Request, str, int, bool]:
    problem = _problem(arguments[:_PROBLEM_ARGUMENTS])
    request = _request(arguments[_PROBLEM_ARGUMENTS:-3])
    backend, scores, keep_rows = arguments[-3:]
    return problem, request, choose_backend(backend, problem, request), scores, keep_rows


def _attention(*arguments: Any) -> list[Tensor]:
    problem, request, backend, scores, keep_rows = _read(arguments)
    # Values cannot be read while a CUDA graph is captured; the kernels read no key or query that is out of range.
    if not request.checked and values_can_be_read(problem.q):
        check_indices(request, problem)
    rows: tuple[Tensor, ...] = ()
    with torch.no_grad(), without_autocast(problem.q), on_device_of(problem.q):
        if backend == "triton":
            from attnlab_kernels.gpu.backend import triton_attention

            out, emitted, kept = triton_attention(problem, request, keep_rows)
            rows = () if kept is None else tuple(kept)
        else:
            out, emitted = tiled_attention(problem, request, scores)
    results = []
    places: dict[str, int] = {}
    for name, _, _ in result_tensors(problem, request):
        value: Any = out if name == "out" else getattr(emitted, name)
        if isinstance(value, tuple):
            value, places[name] = value[places.get(name, 0)], places.get(name, 0) + 1
        results.append(value.contiguous())
    return [*results, *rows]


def _attention_shapes(*arguments: Any) -> list[Tensor]:
    problem, request, backend, _, keep_rows = _read(arguments)
    results = result_tensors(problem, request)
    if keep_rows and backend == "triton":
        results += [Result(name, problem.q.shape[:3], torch.float32) for name in ("pivot", "log_z")]
    return [problem.q.new_empty(shape, dtype=dtype) for _, shape, dtype in results]


def _backward(*arguments: Any) -> list[Tensor]:
    n = len(ResultGradients._fields)
    grads = ResultGradients(*arguments[:n])
    kept, arguments = dict(zip(_KEPT, arguments[n:], strict=False)), arguments[n + len(_KEPT) :]
    problem = _problem(arguments[:_PROBLEM_ARGUMENTS])
    names, backend, scores = arguments[_PROBLEM_ARGUMENTS:]
    needed = names.split(",")
    with torch.no_grad(), without_autocast(problem.q), on_device_of(problem.q):
        if backend == "triton":
            from attnlab_kernels.gpu.launch_backward import Kept, run_backward
            from attnlab_kernels.gpu.launch_forward import Rows

            rows = Rows(kept["pivot"], kept["log_z"])
            found = run_backward(
                problem, Kept(rows, kept["out"], kept["entropy"], kept["key_probes_read"]), grads, needed
            )
        else:
            found = tiled_gradients(problem, grads, needed, scores)
    return [found[name].contiguous() for name in needed]


def _backward_shapes(*arguments: Any) -> list[Tensor]:
    start = len(ResultGradients._fields) + len(_KEPT)
    learned = dict(zip(LEARNED, arguments[start:], strict=False))
    return [learned[name].new_empty(learned[name].shape) for name in arguments[-3].split(",")]


class _Attention(torch.autograd.Function):
    """The gradients. `torch.library.register_autograd` would do, and costs half a millisecond more a call."""

    @staticmethod
    def forward(ctx: Any, keys: Any, *arguments: Any) -> tuple[Tensor, ...]:
        results = _below_autograd("attention", keys, arguments)
        problem, request, backend, scores, _ = _read(arguments)
        names = [name for name, _, _ in result_tensors(problem, request)]
        places = [names.index(name) if name in names else None for name in ("out", *DIFFERENTIABLE)]
        ctx.mark_non_differentiable(*(t for place, t in enumerate(results) if place not in places))
        ctx.set_materialize_grads(False)
        kept: list[Tensor | None] = [None] * len(_KEPT)
        if backend == "triton":
            out, _, entropy, probes = (None if place is None else results[place] for place in places)
            kept = [out, entropy, probes, *results[len(names) :]]
        ctx.save_for_backward(*kept, *arguments[:_TENSORS])
        ctx.places, ctx.numbers = places, (*arguments[_TENSORS:_PROBLEM_ARGUMENTS], backend, scores)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        above = [None if place is None else grads[place] for place in ctx.places]
        needed = [name for name, wanted in zip(LEARNED, ctx.needs_input_grad[1:], strict=False) if wanted]
        found: dict[str, Tensor] = {}
        if any(grad is not None for grad in above):
            results = torch.ops.attnlab.attention_backward(
                *above, *ctx.saved_tensors, *ctx.numbers[:-2], ",".join(needed), *ctx.numbers[-2:]
            )
            found = dict(zip(needed, results, strict=True))
        # One more argument came before these, the keys.
        rest = len(ctx.needs_input_grad) - 1 - len(LEARNED)
        return (None, *(found.get(name) for name in LEARNED), *(None,) * rest)


class _AttentionBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keys: Any, *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(_below_autograd("attention_backward", keys, arguments))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError("Gradients of attention's gradients exist with backend='dense' alone.")


def _below_autograd(name: str, keys: Any, arguments: Sequence[Any]) -> list[Tensor]:
    with torch._C._AutoDispatchBelowAutograd():
        operator = getattr(torch.ops.attnlab, name).default
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments)


def _register(name: str, run: Any, shapes: Any, function: type[torch.autograd.Function]) -> None:
    def differentiably(keys: Any, *arguments: Any) -> list[Tensor]:
        tensors = (t for t in arguments if isinstance(t, Tensor))
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return list(function.apply(keys, *arguments))
        return _below_autograd(name, keys, arguments)

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, differentiably, "Autograd", with_keyset=True)
    torch.library.register_fake(f"attnlab::{name}", shapes, lib=_LIBRARY)


_register("attention", _attention, _attention_shapes, _Attention)
_register("attention_backward", _backward, _backward_shapes, _AttentionBackward)

"""`attention` as an operator of torch: traced, compiled, fake, and refused where it has no meaning."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from attnlab_kernels import Attention, Emit, RelativeBias, attention
from attnlab_kernels import operator as attnlab_operator
from attnlab_kernels.operator import compute, result_tensors
from attnlab_kernels.request import resolve_request
from attnlab_kernels.resolve import resolve_problem
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .error_bound import flat
from .strategies import DEVICE, STATISTICS, every

N = 20
TRITON = pytest.param("triton", marks=pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux"))
BACKENDS = pytest.mark.parametrize("backend", ["tiled", TRITON])
TRACERS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def tensors(requires_grad: bool = True, length: int = N) -> list[Tensor]:
    return [torch.randn(1, 2, length, 8, device=DEVICE, requires_grad=requires_grad) for _ in range(3)]


def learned(requires_grad: bool) -> dict[str, Any]:
    sinks, slopes = torch.zeros(2, device=DEVICE), torch.rand(2, device=DEVICE)
    table, bias = torch.randn(8, 2, device=DEVICE), torch.randn(2, 1, N, device=DEVICE)
    for tensor in (sinks, slopes, table, bias):
        tensor.requires_grad_(requires_grad)
    return {"sinks": sinks, "alibi": slopes, "relative_bias": RelativeBias(table, False, 9), "bias": bias}


def masks() -> dict[str, Any]:
    """Everything that reads values where it can: masks that hide nothing are dropped, indices are looked at."""
    return {
        "key_mask": torch.arange(N, device=DEVICE)[None] != 3,
        "query_mask": torch.arange(N, device=DEVICE)[None] < 15,
        "prefix": torch.tensor([4], device=DEVICE),
        "segments": (torch.arange(N, device=DEVICE) // 12)[None],
        "causal": True,
    }


def loss_of(result: Attention) -> Tensor:
    out, found = result
    assert found.lse is not None
    assert found.entropy is not None
    assert found.key_probes is not None
    finite = torch.where(found.lse.isinf(), 0, found.lse)
    return out.square().sum() + finite.sum() + found.entropy.sum() + found.key_probes.square().sum()


def arguments(backend: str, requires_grad: bool, emit: Emit, **options: Any) -> tuple[Any, ...]:
    problem, request = resolve_request(emit, resolve_problem(*tensors(False), **options))
    leaves = {name: tensor.detach().requires_grad_(requires_grad) for name, tensor in problem.learned().items()}
    problem = problem.with_learned(leaves)
    flat_problem, flat_request = attnlab_operator.flat_problem(problem), attnlab_operator.flat_request(request)
    return *flat_problem, *flat_request, backend, 1 << 18, requires_grad


@BACKENDS
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid"])
def test_torch_finds_no_fault_with_the_operator(backend: str, requires_grad: bool, normalizer: str) -> None:
    options = learned(False) if normalizer == "softmax" else {"normalizer": "sigmoid", "sigmoid_bias": -1.0}
    emit = every(STATISTICS, 1, N, N)
    given = arguments(backend, requires_grad, emit, **options, **masks())
    torch.library.opcheck(torch.ops.attnlab.attention.default, given)


@BACKENDS
def test_fake_tensors_have_the_shapes_and_types_of_real_ones(backend: str) -> None:
    real = attention(*tensors(False), emit=every(STATISTICS, 1, N, N), backend=backend, sinks=torch.zeros(2).to(DEVICE))
    with FakeTensorMode():
        fake = attention(
            *tensors(False), emit=every(STATISTICS, 1, N, N), backend=backend, sinks=torch.zeros(2, device=DEVICE)
        )
    assert isinstance(fake.out, FakeTensor)
    expected, got = {"out": real.out} | flat(real.emitted), {"out": fake.out} | flat(fake.emitted)
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert tensor.shape == expected[name].shape, name
        assert tensor.dtype == expected[name].dtype, name
        assert tensor.stride() == expected[name].stride(), name


@BACKENDS
@pytest.mark.parametrize("tracer", TRACERS)
def test_a_compiled_call_is_one_graph_and_gives_what_the_call_gives(backend: str, tracer: str) -> None:
    options = learned(True) | masks()
    probes = torch.randn(N, 3, device=DEVICE)
    asked = {"lse": True, "entropy": True, "argmax": True, "key_sum": True, "pool": (4, 7), "offsets": [0, 2, 30]}
    asked |= {"gather": torch.randint(-1, N, (1, N, 2), device=DEVICE), "top_k": 3}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Attention:
        return attention(q, k, v, **options, emit=Emit(**asked, key_probes=probes), backend=backend)

    qkv = tensors()
    leaves = [*qkv, options["sinks"], options["alibi"], options["relative_bias"].table, options["bias"]]
    expected = call(*qkv)
    got = torch.compile(call, fullgraph=True, backend=tracer)(*qkv)
    torch.testing.assert_close(got.out, expected.out)
    for name, tensor in flat(got.emitted).items():
        assert tensor.requires_grad == (name in ("lse", "entropy", "key_probes")), name
        torch.testing.assert_close(tensor, flat(expected.emitted)[name])
    grads = [torch.autograd.grad(loss_of(result), leaves) for result in (expected, got)]
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second)


@BACKENDS
def test_a_loss_is_compiled_with_its_gradients(backend: str) -> None:
    probes = torch.randn(N, 3, device=DEVICE)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        emit = Emit(lse=True, entropy=True, key_probes=probes)
        return loss_of(attention(q, k, v, causal=True, emit=emit, backend=backend))

    qkv = tensors()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(function(*qkv), qkv) for function in (loss, compiled)]
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second)


@BACKENDS
def test_lengths_may_be_dynamic(backend: str) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        emit = Emit(entropy=True, pool=4, key_sum=True)
        out, found = attention(q, k, v, causal=True, window=7, emit=emit, backend=backend)
        return out, found.pooled

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for length in (20, 23, 31):
        qkv = tensors(length=length)
        for tensor in qkv:
            torch._dynamo.mark_dynamic(tensor, 2)
        out, pooled = compiled(*qkv)
        torch.autograd.grad(out.sum(), qkv)
        expected = attention(*qkv, causal=True, window=7, emit=Emit(pool=4), backend="dense")
        torch.testing.assert_close(out, expected.out)
        torch.testing.assert_close(pooled, expected.emitted.pooled)
    assert counter.frame_count == 1


@BACKENDS
def test_indices_are_looked_at_in_a_compiled_call_too(backend: str) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor | None:
        return attention(q, k, v, emit=Emit(rows=rows), backend=backend).emitted.rows

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert compiled(*tensors(False), torch.tensor([3, -1], device=DEVICE)).shape == (1, 2, 2, N)
    with pytest.raises(ValueError, match="rows holds an index outside"):
        compiled(*tensors(False), torch.tensor([3, N], device=DEVICE))


@BACKENDS
def test_only_four_results_carry_gradients(backend: str) -> None:
    result = attention(*tensors(), emit=every(STATISTICS, 1, N, N), backend=backend)
    carried = {name for name, tensor in flat(result.emitted).items() if tensor.requires_grad}
    assert carried == {"lse", "entropy", "key_probes"}
    assert result.out.requires_grad


@BACKENDS
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded_where_gradients_are_off(backend: str, mode: Any) -> None:
    qkv = tensors()
    with mode():
        result = attention(*qkv, causal=True, emit=Emit(entropy=True), backend=backend)
    assert not result.out.requires_grad
    torch.testing.assert_close(result.out, attention(*qkv, causal=True, backend="dense").out.detach())


@BACKENDS
def test_nothing_of_the_pattern_is_saved(backend: str) -> None:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    length = 200
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attention(*tensors(length=length), causal=True, emit=Emit(entropy=True, key_sum=True), backend=backend)
    assert len(saved) >= 3
    assert max(tensor.numel() for tensor in saved) < length * length


@BACKENDS
def test_gradients_of_gradients_are_refused(backend: str) -> None:
    qkv = tensors()
    (grad,) = torch.autograd.grad(attention(*qkv, backend=backend).out.sum(), qkv[0], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='dense'"):
        grad.sum().backward()


def test_autocast_stays_out() -> None:
    qkv = tensors()
    expected = torch.autograd.grad(attention(*qkv).out.sum(), qkv)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = attention(*qkv).out
        got = torch.autograd.grad(out.sum(), qkv)
    assert out.dtype == torch.float32
    for first, second in zip(got, expected, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_dropout_is_refused_by_name(backend: str) -> None:
    attention(*tensors(False), dropout_p=0.0, backend=backend)
    with pytest.raises(ValueError, match="dropout_p is"):
        attention(*tensors(False), dropout_p=0.1, backend=backend)


def test_what_is_announced_is_what_comes() -> None:
    emit = every(STATISTICS, 1, N, N)
    problem, request = resolve_request(emit, resolve_problem(*tensors(False), sinks=torch.zeros(2, device=DEVICE)))
    _, found = compute(problem, request, "tiled")
    names = {name for name, _, _ in result_tensors(problem, request)} - {"out"}
    assert names == {name for name, value in vars(found).items() if value is not None}


def test_an_import_brings_neither_triton_nor_a_compiler() -> None:
    program = (
        "import sys, torch, attnlab_kernels\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'triton' not in sys.modules and 'torch._dynamo' not in sys.modules\n"
        "assert not hasattr(torch.ops.attnlab, 'attention')\n"
        "attnlab_kernels.attention(*torch.zeros(3, 1, 1, 2, 8))\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("dynamic", [None, True])
def test_scales_that_vary_and_follow_from_shapes_compile_whole(dynamic: bool | None) -> None:
    def run(q: torch.Tensor, scale: float) -> torch.Tensor:
        return attention(q, q, q, scale=scale * q.shape[-1] ** -0.5, backend="tiled").out

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for scale, width in ((0.3, 8), (0.5, 8), (0.7, 16)):
        q = torch.randn(1, 2, 6, width)
        torch.testing.assert_close(compiled(q, scale), run(q, scale))

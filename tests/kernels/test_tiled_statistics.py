"""The tiled backend against the dense one in float64, over drawn shapes, masks and options.

The bound on an error is twice that of the dense computation in the same precision, plus a few roundings.
"""

import math

import pytest
import torch
from attnlab_kernels import Emit, Emitted, RelativeBias, attention
from attnlab_kernels.request import resolve_request
from attnlab_kernels.resolve import resolve_problem
from attnlab_kernels.tiled import tiled_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

EVERY_ROW_STATISTIC = {"lse": True, "entropy": True, "max_probability": True, "collision": True, "visible": True}
INDICES = ("argmax", "top_k_keys")


@st.composite
def problems(draw: st.DrawFn) -> tuple[tuple[torch.Tensor, ...], dict, Emit]:
    """q, k, v in float64, options of `attention`, and every statistic."""
    size = st.sampled_from([1, 3, 16, 33, 70])
    b, n, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    n_q = draw(size)
    n_k = draw(st.one_of(st.just(n_q), size))
    d, dv, h = draw(st.integers(1, 9)), draw(st.integers(1, 9)), n * group
    torch.manual_seed(draw(st.integers(0, 2**31)))
    double = {"dtype": torch.float64}
    q, k, v = torch.randn(b, h, n_q, d, **double), torch.randn(b, n, n_k, d, **double), torch.randn(b, n, n_k, dv)
    masks = {
        "causal": lambda: True,
        "query_offset": lambda: draw(st.integers(-5, 40)),
        "window": lambda: draw(st.integers(1, 40)),
        "first_tokens": lambda: draw(st.integers(0, 5)),
        "prefix": lambda: torch.randint(0, n_k + 1, (b,)),
        "segments": lambda: (torch.randint(0, 3, (b, n_q)), torch.randint(0, 3, (b, n_k))),
        "key_mask": lambda: torch.rand(b, n_k) < 0.7,
        "query_mask": lambda: torch.rand(b, n_q) < 0.7,
        "mask": lambda: torch.rand(b, 1, n_q, n_k) < 0.7,
        "bias": lambda: torch.randn(h, 1, n_k, **double),
        "alibi": lambda: torch.rand(h, **double),
        "relative_bias": lambda: RelativeBias(torch.randn(8, h, **double), draw(st.booleans()), 20),
        "softcap": lambda: 2.0,
        "sinks": lambda: torch.randn(h, **double),
        "scale": lambda: 3.0,
    }
    options = {name: masks[name]() for name in draw(st.lists(st.sampled_from(sorted(masks)), unique=True, max_size=5))}
    if "sinks" not in options and draw(st.booleans()):
        options |= {"normalizer": "sigmoid", "sigmoid_bias": -1.0}
    emit = Emit(
        **EVERY_ROW_STATISTIC,
        argmax=True,
        key_probes=torch.randn(b, n_k, 2, **double),
        query_probes=torch.randn(n_q, 2, **double),
        gather=torch.randint(-1, n_k, (b, n_q, 3)),
        rows=torch.randint(-1, n_q, (2,)),
        columns=torch.randint(-1, n_k, (b, 2)),
        key_sum=True,
        key_square=True,
        key_max=True,
        pool=(4, 7),
        offsets=([-5, -1, 0, 1, 4, 50], [0, 2]),
        top_k=4,
        head_gram=True,
    )
    return (q, k, v.double()), options, emit


def in_precision(value, dtype):
    """Every floating-point tensor in another precision."""
    if isinstance(value, RelativeBias):
        return value._replace(table=value.table.to(dtype))
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def resolved(*qkv: torch.Tensor, emit: Emit, **options):
    return resolve_request(emit, resolve_problem(*qkv, **options))


def run(qkv, options, emit, backend, dtype, scores=300):
    qkv, options = [t.to(dtype) for t in qkv], {name: in_precision(v, dtype) for name, v in options.items()}
    if backend == "dense":
        return attention(*qkv, **options, emit=emit, backend="dense")
    problem, request = resolved(*qkv, **options, emit=emit)
    return tiled_attention(problem, request, scores=scores)


def flat(emitted: Emitted) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in vars(emitted).items():
        for number, tensor in enumerate(value if isinstance(value, tuple) else (value,)):
            if tensor is not None:
                found[f"{name} {number}"] = tensor
    return found


def assert_as_exact_as_dense(got, dense, exact) -> None:
    """The error is at most twice that of the dense computation, plus sixteen roundings of the largest value."""
    assert got.shape == exact.shape
    assert torch.equal(got.isinf(), exact.isinf())
    finite = exact.isfinite()
    got, dense, exact = got[finite].double(), dense[finite].double(), exact[finite]
    if not exact.numel():
        return
    floor = 16 * torch.finfo(torch.float32).eps * max(1.0, float(exact.abs().max()))
    assert (got - exact).abs().max() <= 2 * (dense - exact).abs().max() + floor


@settings(max_examples=60, deadline=None)
@given(problems())
def test_every_statistic_in_single_precision_is_as_exact_as_dense(problem) -> None:
    exact = run(*problem, "dense", torch.float64)
    dense = run(*problem, "dense", torch.float32)
    out, emitted = run(*problem, "tiled", torch.float32)
    assert_as_exact_as_dense(out, dense.out, exact.out)
    low, high = flat(dense.emitted), flat(exact.emitted)
    for name, got in flat(emitted).items():
        if not name.startswith(INDICES):
            assert_as_exact_as_dense(got, low[name], high[name])
        else:
            assert torch.equal(got < 0, high[name] < 0)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_in_double_precision_it_is_the_dense_computation(problem) -> None:
    exact, got = run(*problem, "dense", torch.float64), run(*problem, "tiled", torch.float64)
    torch.testing.assert_close(got[0], exact.out, rtol=1e-10, atol=1e-10)
    high = flat(exact.emitted)
    for name, value in flat(got[1]).items():
        torch.testing.assert_close(value, high[name], rtol=1e-10, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(problems())
def test_gradients_are_those_of_dense(problem) -> None:
    qkv, options, emit = problem
    learned = [*qkv, emit.key_probes]
    learned += [options[name] for name in ("bias", "alibi", "sinks") if name in options]
    learned += [options["relative_bias"].table] if "relative_bias" in options else []
    emit = Emit(lse=True, entropy=True, key_probes=emit.key_probes)
    grads = []
    for leaf in learned:
        leaf.requires_grad_()
    for backend in ("dense", "tiled"):
        out, found = run(qkv, options, emit, backend, torch.float64)
        torch.manual_seed(0)
        outputs = [out, found.lse.masked_fill(found.lse == -math.inf, 0), found.entropy, found.key_probes]
        loss = sum((output * torch.randn_like(output)).sum() for output in outputs)
        grads.append(torch.autograd.grad(loss, learned, allow_unused=True, materialize_grads=True))
    for dense, tiled in zip(*grads, strict=True):
        torch.testing.assert_close(tiled, dense, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("backend", ["dense", "tiled"])
def test_a_shift_of_a_hundred_thousand_leaves_the_entropy_its_digits(backend: str) -> None:
    torch.manual_seed(0)
    # Multiples of 1/64 with a shift of 1e5 are exact in float32, so only the statistic's own rounding is left.
    scores = (torch.randn(1, 1, 64, 300) * 64).round() / 64
    zero = torch.zeros(1, 1, 64, 1), torch.zeros(1, 1, 300, 1), torch.randn(1, 1, 300, 4)
    exact = torch.distributions.Categorical(logits=scores.double()).entropy()
    emit = Emit(entropy=True, max_probability=True, key_sum=True)
    _, found = attention(*zero, bias=scores + 1e5, emit=emit, backend=backend)
    assert (found.entropy - exact).abs().max() < 3e-6
    torch.testing.assert_close(found.key_sum.sum(), torch.tensor(64.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 1, 2, 40, 8).to(dtype)
    emit = Emit(**EVERY_ROW_STATISTIC)
    out, found = attention(q, k, v, causal=True, emit=emit, backend="tiled")
    single = attention(q.float(), k.float(), v.float(), causal=True, emit=emit, backend="tiled")
    assert out.dtype == dtype
    assert found.entropy.dtype == torch.float32
    assert torch.equal(found.entropy, single.emitted.entropy)
    assert torch.equal(out, single.out.to(dtype))


def test_layout_in_memory_does_not_matter() -> None:
    q, k, v = (torch.randn(2, 40, 3, 8) for _ in range(3))
    swapped = [t.transpose(1, 2) for t in (q, k, v)]
    emit = Emit(entropy=True, key_sum=True)
    strided = attention(*swapped, causal=True, emit=emit)
    plain = attention(*(t.contiguous() for t in swapped), causal=True, emit=emit)
    torch.testing.assert_close(strided.out, plain.out)
    torch.testing.assert_close(strided.emitted.key_sum, plain.emitted.key_sum)


def test_two_runs_and_any_number_of_threads_give_the_same_bytes() -> None:
    q, k, v = torch.randn(3, 1, 4, 600, 16)
    emit = Emit(**EVERY_ROW_STATISTIC, key_sum=True, key_square=True, key_max=True, pool=32, offsets=[0, 1, 8, 600])
    threads = torch.get_num_threads()
    found = []
    for number in (threads, threads, 1):
        torch.set_num_threads(number)
        found.append(attention(q, k, v, causal=True, emit=emit))
    torch.set_num_threads(threads)
    assert torch.get_num_threads() == threads
    for other in found[1:]:
        assert torch.equal(found[0].out, other.out)
        for name, value in flat(found[0].emitted).items():
            assert torch.equal(value, flat(other.emitted)[name]), name


def test_it_runs_in_inference_mode_and_on_tensors_made_there() -> None:
    with torch.inference_mode():
        q, k, v = torch.randn(3, 2, 4, 300, 8)
        out, found = attention(q, k, v, causal=True, emit=Emit(key_sum=True, entropy=True))
    torch.testing.assert_close(out, attention(q, k, v, causal=True, backend="dense").out)
    assert found.key_sum.shape == (2, 4, 300)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // 4)
        return result


def test_no_tensor_grows_as_the_square_of_the_length() -> None:
    emit = Emit(**EVERY_ROW_STATISTIC, key_sum=True, key_max=True, offsets=[0, 1, 5000], top_k=2)
    threads = torch.get_num_threads()
    largest = []
    for length in (1024, 4096):
        q, k, v = torch.randn(3, 1, 1, length, 8, requires_grad=True).unbind()
        torch.set_num_threads(1)
        problem, request = resolved(q, k, v, causal=True, emit=emit)
        with Largest() as seen:
            out, _ = tiled_attention(problem, request, scores=1 << 14)
            out.sum().backward()
        torch.set_num_threads(threads)
        largest.append(seen.numbers)
    assert largest[1] <= 4.5 * largest[0]

"""What the tiled backend does beside the contract: double precision, gradients, threads, memory that grows as N."""

import math
from typing import Any

import pytest
import torch
from attnlab_kernels import Emit, RelativeBias, attention, strips
from attnlab_kernels.gradients import ResultGradients
from attnlab_kernels.request import resolve_request
from attnlab_kernels.resolve import resolve_problem
from attnlab_kernels.tiled import tiled_attention
from attnlab_kernels.tiled_gradients import tiled_gradients
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from .error_bound import INDICES, assert_points_at_as_large, flat, pattern, run
from .strategies import STATISTICS, Case, cases

EVERY_ROW_STATISTIC = {"lse": True, "entropy": True, "max_probability": True, "collision": True, "visible": True}
SMALL_TILES = 300


@settings(max_examples=40, deadline=None)
@given(cases(statistics=STATISTICS))
def test_in_double_precision_it_is_the_dense_computation(case: Case) -> None:
    (exact_out, exact), (out, found) = run(case, "dense"), run(case, "tiled", SMALL_TILES)
    torch.testing.assert_close(out, exact_out, rtol=1e-10, atol=1e-10)
    got, expected = flat(found), flat(exact)
    assert got.keys() == expected.keys()
    entries = pattern(case)
    for name, value in got.items():
        if name in INDICES:
            # Entries that differ by a rounding may stand in either order.
            assert_points_at_as_large(value, expected[name], entries, entries)
        else:
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(cases(statistics=("key_probes",)))
def test_gradients_are_those_of_dense(case: Case) -> None:
    qkv, options, emit = case
    learned = [*qkv, emit.key_probes]
    learned += [options[name] for name in ("bias", "alibi", "sinks") if name in options]
    learned += [options["relative_bias"].table] if "relative_bias" in options else []
    emit = Emit(lse=True, entropy=True, key_probes=emit.key_probes)
    grads = []
    for leaf in learned:
        leaf.requires_grad_()
    for backend in ("dense", "tiled"):
        out, found = run(Case(qkv, options, emit), backend, SMALL_TILES if backend == "tiled" else None)
        torch.manual_seed(0)
        outputs = [out, found.lse.masked_fill(found.lse == -math.inf, 0), found.entropy, found.key_probes]
        loss = sum((output * torch.randn_like(output)).sum() for output in outputs)
        grads.append(torch.autograd.grad(loss, learned, allow_unused=True, materialize_grads=True))
    for dense, tiled in zip(*grads, strict=True):
        torch.testing.assert_close(tiled, dense, rtol=1e-8, atol=1e-8)


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


@pytest.mark.parametrize("of_entries", [{}, {"pool": 32, "offsets": [0, 1, 8, 600]}], ids=["spent", "kept"])
def test_two_runs_and_any_number_of_threads_give_the_same_bytes(
    of_entries: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strips, "WORTH_THREADS", 1)
    q, k, v = torch.randn(3, 1, 4, 600, 16)
    emit = Emit(**EVERY_ROW_STATISTIC, key_sum=True, key_square=True, key_max=True, **of_entries)
    threads = torch.get_num_threads()
    found = []
    for number in (2, 3, 2, 1):
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


@pytest.mark.parametrize("of_entries", [{}, {"offsets": [0, 1, 5000], "top_k": 2}], ids=["spent", "kept"])
def test_no_tensor_grows_as_the_square_of_the_length(of_entries: dict[str, Any]) -> None:
    emit = Emit(**EVERY_ROW_STATISTIC, key_sum=True, key_max=True, **of_entries)
    threads = torch.get_num_threads()
    largest = []
    for length in (1024, 4096):
        q, k, v = torch.randn(3, 1, 1, length, 8).unbind()
        torch.set_num_threads(1)
        problem, request = resolve_request(emit, resolve_problem(q, k, v, causal=True))
        with Largest() as seen:
            out, _ = tiled_attention(problem, request, scores=1 << 14)
            tiled_gradients(problem, ResultGradients(torch.ones_like(out)), ("q", "k", "v"), scores=1 << 14)
        torch.set_num_threads(threads)
        largest.append(seen.numbers)
    assert largest[1] <= 4.5 * largest[0]


@pytest.mark.parametrize(("bias", "size"), [(-5.0, 1.0), (-45.0, 1.0), (-80.0, 1.0), (-800.0, 1.0), (0.0, 60.0)])
@pytest.mark.parametrize("padded", [False, True])
def test_sigmoids_far_from_one_keep_their_digits(bias: float, size: float, padded: bool) -> None:
    """Their sums are of the weights themselves while these tell, and of their logarithms below."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 90, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    exists = torch.ones(2, 90, dtype=torch.bool)
    exists[1, :7] = not padded
    options = {
        "normalizer": "sigmoid", "sigmoid_bias": torch.full((3,), bias), "causal": True,
        "key_mask": exists, "query_mask": exists,
    }  # fmt: skip
    emit = Emit(**EVERY_ROW_STATISTIC, key_sum=True, key_square=True, key_max=True)
    exact = attention(size * q, k, v, **options, emit=emit, backend="dense")
    dense, tiled = (
        attention(size * q.float(), k.float(), v.float(), **options, emit=emit, backend=backend)
        for backend in ("dense", "tiled")
    )
    for name, want in flat(exact.emitted).items():
        near = [flat(found.emitted)[name].double()[..., 7:] for found in (dense, tiled)]
        error, bound = ((got - want[..., 7:]).abs().max() for got in reversed(near))
        # Each of 90 summands may be too small to be a normal number, and counts as zero then.
        limits = torch.finfo(torch.float32)
        assert error <= 2 * bound + 16 * limits.eps * want[..., 7:].abs().max() + 90 * limits.tiny, name
    assert torch.equal(tiled.emitted.lse == -math.inf, exact.emitted.lse == -math.inf)


@pytest.mark.parametrize(("heads", "key_heads"), [(12, 1), (6, 3), (8, 2), (12, 12)])
def test_heads_that_share_keys_are_the_same_as_heads_with_copies(
    heads: int, key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strips, "WORTH_THREADS", 1)  # so that few key heads are copied for the cores
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, heads, 400, 8, generator=generator)
    k, v = torch.randn(2, 2, key_heads, 400, 8, generator=generator)
    emit = Emit(**EVERY_ROW_STATISTIC, key_sum=True, key_square=True, key_max=True)
    shared = attention(q, k, v, causal=True, emit=emit)
    own = attention(q, *(x.repeat_interleave(heads // key_heads, 1) for x in (k, v)), causal=True, emit=emit)
    torch.testing.assert_close(shared.out, own.out)
    for name, value in flat(shared.emitted).items():
        torch.testing.assert_close(value, flat(own.emitted)[name], msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window": 40},
        {"causal": True, "window": 40, "first_tokens": 3},
        {"causal": True, "normalizer": "sigmoid", "sigmoid_bias": -3.0},
        {"causal": True, "alibi": torch.tensor([0.5, 0.25, 0.1, 0.05]), "softcap": 5.0},
    ],
    ids=lambda options: " ".join(options),
)
@pytest.mark.parametrize("key_heads", [1, 4])
def test_keys_that_are_turned_over_are_the_same_keys(
    options: dict, key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 200, 8, generator=generator)
    k, v = torch.randn(2, 2, key_heads, 230, 8, generator=generator)
    emit = Emit(**EVERY_ROW_STATISTIC, key_sum=True, key_square=True, key_max=True, top_k=3, pool=16)
    found = []
    for many in (201, 200):
        monkeypatch.setattr(strips, "MANY_QUERIES", many)
        turned = strips.prepared(resolve_problem(q, k, v, **options)).k.stride(-1) != 1
        assert turned == (many == 200)
        found.append(attention(q, k, v, **options, emit=emit, backend="tiled"))
    torch.testing.assert_close(found[0].out, found[1].out)
    for name, value in flat(found[0].emitted).items():
        torch.testing.assert_close(value, flat(found[1].emitted)[name], msg=name)


@pytest.mark.parametrize("bias", [-44.0, -20.0, -5.0, 3.0])
def test_rows_of_one_sigmoid_have_no_entropy(bias: float) -> None:
    q, k, v = torch.randn(3, 1, 2, 64, 16)
    emit = Emit(entropy=True, collision=True, max_probability=True)
    found = attention(
        q, k, v, causal=True, window=1, normalizer="sigmoid", sigmoid_bias=torch.full((2,), bias), emit=emit
    ).emitted
    assert bool((found.entropy == 0).all())
    assert bool((found.collision == 1).all())
    assert bool((found.max_probability == 1).all())


@pytest.mark.parametrize("largest", [0.0, -5.0, -10.0, -13.0, -16.0])
@pytest.mark.parametrize("below", [2.0, 8.0, 14.0, 17.0])
def test_rows_with_one_large_sigmoid_keep_the_digits_of_their_entropy(largest: float, below: float) -> None:
    logits = torch.full((20, 8), -200.0, dtype=torch.float64)
    logits[:, 3] = largest
    logits[:, 5] = largest - below + torch.linspace(-1, 1, 20, dtype=torch.float64)
    q, k, v = torch.zeros(1, 1, 20, 4), *torch.zeros(2, 1, 1, 8, 4)
    options = {"bias": logits, "normalizer": "sigmoid", "emit": Emit(entropy=True)}
    exact = attention(q.double(), k.double(), v.double(), **options, backend="dense").emitted.entropy
    dense, tiled = (
        attention(q, k, v, **options, backend=backend).emitted.entropy.double() for backend in ("dense", "tiled")
    )
    # The largest of a row may round in two ways, and so may its share of 1.
    assert (tiled - exact).abs().max() <= 2 * (dense - exact).abs().max() + 2 * torch.finfo(torch.float32).eps


def test_squares_of_small_sigmoids_are_not_lost() -> None:
    q, k, v = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1000, 1), torch.ones(1, 1, 1000, 1)
    k[0, 0, 0, 0] = 2.5
    options = {"scale": 1.0, "normalizer": "sigmoid", "sigmoid_bias": torch.tensor([-44.0])}
    found, exact = (
        attention(*(x.to(dtype) for x in (q, k, v)), **options, emit=Emit(collision=True), backend=backend)
        for dtype, backend in ((torch.float32, "tiled"), (torch.float64, "dense"))
    )
    torch.testing.assert_close(found.emitted.collision.double(), exact.emitted.collision, rtol=1e-5, atol=0)


@pytest.mark.parametrize("what", ["a bias by distance", "a key"])
def test_a_visible_logit_of_minus_infinity_leaves_the_row_its_entropy(what: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 8, generator=generator).abs() for _ in range(3))
    table = torch.randn(8, 2, generator=generator)
    if what == "a key":
        k[0, 0, 1] = -math.inf
    else:
        table[3] = -math.inf
    options = {"relative_bias": RelativeBias(table, max_distance=32), "emit": Emit(entropy=True)}
    exact = attention(q.double(), k.double(), v.double(), **options, backend="dense").emitted.entropy
    found = attention(q, k, v, **options, backend="tiled").emitted.entropy
    assert not exact.isnan().any()
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


def test_the_largest_of_saturated_sigmoids_is_found() -> None:
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([20.0, 25.0, 30.0]).view(1, 1, 3, 1)
    found = attention(q, k, k, scale=1.0, normalizer="sigmoid", emit=Emit(argmax=True), backend="tiled")
    assert found.emitted.argmax.item() == 2


def test_sigmoids_near_one_keep_the_digits_of_their_logarithms() -> None:
    q, k = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    for bias in (5.0, 12.0, 60.0):
        options = {"scale": 1.0, "normalizer": "sigmoid", "sigmoid_bias": torch.tensor([bias])}
        found = attention(q, k, k, **options, emit=Emit(lse=True), backend="tiled").emitted.lse
        torch.testing.assert_close(found, torch.nn.functional.logsigmoid(1 + options["sigmoid_bias"]).view(1, 1, 1))

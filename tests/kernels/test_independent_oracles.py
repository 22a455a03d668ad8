"""Statistics against computations that share no code with any backend, and against one another."""

import math

import pytest
import torch
from attnlab_kernels import Emit, attention

from .strategies import DEVICE, STATISTICS, every

BACKENDS = pytest.mark.parametrize("backend", ["dense", "tiled", "triton"])
DTYPE = {"dense": torch.float64, "tiled": torch.float32, "triton": torch.float32}


@pytest.fixture
def fused_multiply_add(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardware rounds a fused multiply-add once; the interpreter rounds twice, and loses what the kernels rely on."""
    if DEVICE == "cuda":
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_fma(_: object, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        exact = x.data.astype("float64") * y.data + z.data
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", create_fma)


def tensors(backend: str, n_q: int = 40, n_k: int = 53, d: int = 16) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((1, 4, n_q, d), (1, 2, n_k, d), (1, 2, n_k, d))
    return tuple(torch.randn(*shape, device=DEVICE, dtype=DTYPE[backend]) for shape in shapes)


@BACKENDS
def test_entropy_is_lse_minus_what_attention_over_the_keys_reads(backend: str) -> None:
    q, k, _ = tensors(backend)
    out, found = attention(q, k, k, causal=True, emit=Emit(lse=True, entropy=True), backend=backend)
    torch.testing.assert_close(found.entropy, found.lse - (q * out).sum(-1) / 4, rtol=2e-6, atol=4e-6)


@BACKENDS
def test_key_sums_are_the_gradient_of_torchs_attention_to_a_column_of_values(backend: str) -> None:
    q, k, v = tensors(backend)
    counts = torch.rand(1, 40, device=DEVICE) < 0.7
    ones = torch.ones(1, 4, 53, 1, device=DEVICE, dtype=torch.float64, requires_grad=True)
    seen = torch.ones(40, 53, dtype=torch.bool, device=DEVICE).tril(13)
    keys = k.double().repeat_interleave(2, 1)
    read = torch.nn.functional.scaled_dot_product_attention(q.double(), keys, ones, seen)
    (read * counts[:, None, :, None]).sum().backward()
    emit = Emit(key_sum=True, query_probes=torch.ones(40, 1, device=DEVICE))
    found = attention(q, k, v, causal=True, query_mask=counts, emit=emit, backend=backend).emitted
    torch.testing.assert_close(found.key_sum.double(), ones.grad[..., 0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found.query_probes[..., 0], found.key_sum, rtol=2e-6, atol=2e-6)


@BACKENDS
def test_key_sums_are_its_own_gradient_to_a_column_of_values(backend: str) -> None:
    q, k, _ = tensors(backend)
    ones = torch.ones(1, 2, 53, 1, device=DEVICE, dtype=q.dtype, requires_grad=True)
    out, found = attention(q, k, ones, causal=True, emit=Emit(key_sum=True), backend=backend)
    out.sum().backward()
    by_group = found.key_sum.unflatten(1, (2, 2)).sum(2)
    torch.testing.assert_close(ones.grad[..., 0], by_group, rtol=2e-6, atol=2e-6)


@BACKENDS
def test_statistics_agree_with_one_another(backend: str) -> None:
    q, k, v = tensors(backend)
    emit = every(STATISTICS, 1, 40, 53)
    wide = {"pool": (8, 53), "offsets": ([-100, 0, 1, 7, 100], [-100, 100]), "top_k": 53, "key_probes": v[:, :1]}
    chosen = {"rows": torch.arange(40, device=DEVICE), "columns": torch.arange(53, device=DEVICE)}
    asked = Emit(**{**vars(emit), **wide, **chosen})
    out, found = attention(q, k, v, causal=True, emit=asked, backend=backend)
    close = {"rtol": 3e-6, "atol": 3e-6}
    pattern = found.rows
    torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]), **close)
    torch.testing.assert_close(found.columns, pattern, **close)
    torch.testing.assert_close(found.key_sum, pattern.sum(2), **close)
    torch.testing.assert_close(found.key_square, pattern.square().sum(2), **close)
    torch.testing.assert_close(found.key_max, pattern.amax(2), **close)
    torch.testing.assert_close(found.collision, pattern.square().sum(-1), **close)
    torch.testing.assert_close(found.max_probability, pattern.amax(-1), **close)
    torch.testing.assert_close(found.top_k_values, pattern.sort(-1, descending=True).values, **close)
    assert torch.equal(found.top_k_keys[..., 0], found.argmax)
    assert torch.equal((found.top_k_keys >= 0).sum(-1).float(), found.visible.float())
    gram = torch.einsum("bhij,bgij->bhg", pattern, pattern)
    torch.testing.assert_close(found.head_gram, gram, rtol=3e-6, atol=1e-4)
    total = torch.full((1, 4), 40.0, device=DEVICE, dtype=q.dtype)
    for number in range(2):
        sums = found.pooled[number] * found.pooled_count[number]
        torch.testing.assert_close(sums.sum((-1, -2)), total)
        torch.testing.assert_close(found.offsets[number].sum(-1), total)
        assert torch.equal(found.pooled_count[number].sum((-1, -2)), found.offset_count[number].sum(-1))
    assert torch.equal(found.key_count.sum(-1), found.offset_count[1][..., 0])
    torch.testing.assert_close(found.key_probes[:, :2], out[:, :2], **close)


@BACKENDS
@pytest.mark.usefixtures("fused_multiply_add")
@pytest.mark.parametrize("through", ["products", "bias"])
def test_a_shift_of_a_hundred_thousand_leaves_the_statistics_their_digits(backend: str, through: str) -> None:
    torch.manual_seed(0)
    # Multiples of 1/64 with a shift of 1e5 are exact in float32, so only the statistics' own rounding is left.
    if through == "bias":
        scores = (torch.randn(1, 1, 64, 200, device=DEVICE) * 64).round() / 64
        q, k = torch.zeros(1, 1, 64, 1, device=DEVICE), torch.zeros(1, 1, 200, 1, device=DEVICE)
        options = {"bias": scores + 1e5}
    else:
        q, k = (torch.randint(-8, 9, (1, 1, n, 4), device=DEVICE) / 8 for n in (64, 200))
        scores = q @ k.mT
        q = torch.nn.functional.pad(q, (1, 0), value=1.0)
        k = torch.nn.functional.pad(k, (1, 0), value=1e5)
        options = {"scale": 1.0}
    v = torch.randn(1, 1, 200, 4, device=DEVICE)
    exact = torch.distributions.Categorical(logits=scores.double())
    every_row = torch.arange(64, device=DEVICE)
    emit = Emit(entropy=True, max_probability=True, collision=True, key_sum=True, rows=every_row, top_k=1)
    _, found = attention(q, k, v, emit=emit, backend=backend, **options)
    close = {"rtol": 0, "atol": 3e-6}
    torch.testing.assert_close(found.entropy.double(), exact.entropy(), **close)
    torch.testing.assert_close(found.max_probability.double(), exact.probs.amax(-1), **close)
    torch.testing.assert_close(found.collision.double(), exact.probs.square().sum(-1), **close)
    torch.testing.assert_close(found.rows.double(), exact.probs, **close)
    torch.testing.assert_close(found.top_k_values[..., 0], found.max_probability, **close)
    torch.testing.assert_close(found.rows.sum(-1), torch.ones(1, 1, 64, device=DEVICE), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.key_sum.sum(), torch.tensor(64.0, device=DEVICE), rtol=1e-6, atol=0)


@BACKENDS
@pytest.mark.usefixtures("fused_multiply_add")
def test_a_shift_of_a_hundred_thousand_leaves_the_entropys_gradient_its_digits(backend: str) -> None:
    torch.manual_seed(0)
    scores = (torch.randn(1, 1, 20, 60, device=DEVICE) * 64).round() / 64
    exact = scores.double().requires_grad_()
    torch.distributions.Categorical(logits=exact).entropy().sum().backward()
    bias = (scores + 1e5).requires_grad_()
    q, k, v = (torch.zeros(1, 1, n, 4, device=DEVICE) for n in (20, 60, 60))
    attention(q, k, v, bias=bias, emit=Emit(entropy=True), backend=backend).emitted.entropy.sum().backward()
    torch.testing.assert_close(bias.grad.double(), exact.grad, rtol=0, atol=3e-7)


@BACKENDS
@pytest.mark.usefixtures("fused_multiply_add")
@pytest.mark.parametrize("shift", [-1e4, -120.0])
def test_logits_far_below_zero_are_as_good_as_any(backend: str, shift: float) -> None:
    torch.manual_seed(0)
    scores = (torch.randn(1, 1, 20, 50, device=DEVICE) * 64).round() / 64
    nothing = torch.zeros(1, 1, 20, 1, device=DEVICE), torch.zeros(1, 1, 50, 1, device=DEVICE)
    emit = Emit(entropy=True, lse=True, collision=True, key_sum=True)
    v = torch.randn(1, 1, 50, 4, device=DEVICE)
    out, found = attention(*nothing, v, bias=scores + shift, emit=emit, backend=backend)
    plain, expected = attention(*nothing, v, bias=scores, emit=emit, backend="dense")
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(found.lse - shift, expected.lse, rtol=0, atol=2e-3 if shift < -1e3 else 1e-5)
    for name in ("entropy", "collision", "key_sum"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


@BACKENDS
def test_of_equal_entries_the_first_key_is_the_largest(backend: str) -> None:
    q, k = torch.zeros(1, 1, 5, 8, device=DEVICE), torch.randn(1, 1, 80, 8, device=DEVICE)
    found = attention(q, k, k, window=4, emit=Emit(argmax=True, top_k=3), backend=backend).emitted
    first = torch.arange(72, 77, device=DEVICE)
    assert torch.equal(found.argmax[0, 0], first)
    keys = found.top_k_keys[0, 0].sort(-1).values
    assert ((keys >= first[:, None]) & (keys < 80)).all()
    assert (keys.diff(dim=-1) > 0).all()


@BACKENDS
def test_a_key_between_equal_logits_takes_its_share(backend: str) -> None:
    logits = torch.log(torch.tensor([1.0, 2.0, 5.0], device=DEVICE))
    q, k = torch.zeros(1, 1, 1, 1, device=DEVICE), torch.zeros(1, 1, 3, 1, device=DEVICE)
    values = torch.eye(3, device=DEVICE)[None, None]
    emit = Emit(lse=True, entropy=True, collision=True, max_probability=True)
    out, found = attention(q, k, values, bias=logits, emit=emit, backend=backend)
    torch.testing.assert_close(out.flatten(), torch.tensor([0.125, 0.25, 0.625], device=DEVICE))
    assert found.lse.item() == pytest.approx(math.log(8), abs=1e-6)
    expected = -(0.125 * math.log(0.125) + 0.25 * math.log(0.25) + 0.625 * math.log(0.625))
    assert found.entropy.item() == pytest.approx(expected, abs=1e-6)
    assert found.collision.item() == pytest.approx(0.125**2 + 0.25**2 + 0.625**2, abs=1e-6)
    assert found.max_probability.item() == pytest.approx(0.625, abs=1e-6)

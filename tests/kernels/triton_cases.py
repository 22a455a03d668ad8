"""The triton kernel's numbers; `test_triton_forward.py` runs this file, in triton's interpreter where no GPU is."""

import pytest
import torch
import triton
from attnlab_kernels import Emit, attention
from attnlab_kernels.triton_forward import attention_forward_kernel, padded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = {"lse": True, "entropy": True, "max_probability": True, "argmax": True, "collision": True, "visible": True}

# heads, key heads, queries, keys, D, Dv, options
SHAPES = [
    (1, 1, 1, 1, 8, 8, {}),
    (2, 1, 63, 63, 16, 16, {"causal": True}),
    (4, 2, 33, 100, 20, 7, {"causal": True}),
    (2, 2, 100, 33, 64, 64, {"causal": True}),
    (2, 2, 65, 47, 72, 96, {}),
    (1, 1, 40, 40, 16, 16, {"causal": True, "query_offset": 5}),
    (1, 1, 40, 70, 16, 16, {"causal": True, "query_offset": -9}),
    (1, 1, 20, 40, 256, 200, {"causal": True}),
]


def errors(got, exact):
    finite = exact.isfinite()
    assert torch.equal(got.isfinite(), finite)
    return (got[finite].double() - exact[finite].double()).abs().max() if finite.any() else torch.zeros(())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_and_probes_are_as_exact_as_a_dense_computation(shape, dtype) -> None:
    h, n, n_q, n_k, d, dv, options = shape
    torch.manual_seed(0)
    q, k, v = ((torch.randn(2, *s) * 2).to(DEVICE, dtype) for s in ((h, n_q, d), (n, n_k, d), (n, n_k, dv)))
    emit = Emit(**ROWS, key_probes=torch.randn(n_k, 3, device=DEVICE))
    got = attention(q, k, v, **options, emit=emit, backend="triton")
    low = attention(q, k, v, **options, emit=emit, backend="dense")
    exact = attention(q.double(), k.double(), v.double(), **options, emit=emit, backend="dense")
    floor = 16 * torch.finfo(torch.float32).eps
    # P is rounded to the values' precision before the product, as in every attention kernel.
    assert errors(got.out, exact.out) <= 2 * errors(low.out, exact.out) + 4 * torch.finfo(dtype).eps
    for name in (*ROWS, "key_probes"):
        value, reference = getattr(got.emitted, name), getattr(exact.emitted, name)
        largest = float(reference[reference.isfinite()].abs().max()) if reference.isfinite().any() else 1
        bound = 2 * errors(getattr(low.emitted, name), reference) + floor * max(1, largest)
        assert errors(value, reference) <= bound, name


def test_tensors_need_not_be_contiguous() -> None:
    q, k, v = torch.randn(3, 1, 30, 2, 32, device=DEVICE)
    swapped = [t.transpose(1, 2)[..., ::2] for t in (q, k, v)]
    got = attention(*swapped, causal=True, emit=Emit(entropy=True), backend="triton")
    want = attention(*swapped, causal=True, emit=Emit(entropy=True), backend="dense")
    torch.testing.assert_close(got.out, want.out)
    torch.testing.assert_close(got.emitted.entropy, want.emitted.entropy)


@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (32, 64), (64, 32), (128, 128)])
def test_every_element_is_written_whatever_the_tile(block_m: int, block_n: int) -> None:
    b, h, n_q, n_k, d, g = 1, 2, 50, 70, 24, 3
    q, k, v = (torch.randn(b, h, n, d, device=DEVICE) for n in (n_q, n_k, n_k))
    f = torch.randn(b, h, n_k, g, device=DEVICE)
    poison = {"dtype": torch.float32, "device": DEVICE, "fill_value": float("nan")}
    out, probes = torch.full((b, h, n_q, d), **poison), torch.full((b, h, n_q, g), **poison)
    lse, entropy, top, collision = (torch.full((b, h, n_q), **poison) for _ in range(4))
    argmax = torch.full((b, h, n_q), -7, device=DEVICE)
    attention_forward_kernel[(b * h, triton.cdiv(n_q, block_m))](
        *(q, k, v, f, out, lse, entropy, top, argmax, collision, probes),
        *(*q.stride(), *k.stride(), *v.stride(), *f.stride()),
        *(h, n_q, n_k, n_k - n_q, d, d, g, 0.3),
        GROUP=1,
        CAUSAL=True,
        LSE=True,
        ENTROPY=True,
        MAX_PROBABILITY=True,
        ARGMAX=True,
        COLLISION=True,
        PROBES=True,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=padded(d),
        BLOCK_DV=padded(d),
        BLOCK_G=padded(g),
        PROBE_PRECISION="ieee",
    )
    for written in (out, probes, lse, entropy, top, collision):
        assert not written.isnan().any()
    assert (argmax >= 0).all()


def test_rows_that_see_no_key_are_empty() -> None:
    q, k, v = torch.randn(3, 1, 1, 40, 16, device=DEVICE)
    out, found = attention(q, k, v, causal=True, query_offset=-3, emit=Emit(**ROWS), backend="triton")
    assert not out[:, :, :3].any()
    assert (found.lse[:, :, :3] == -torch.inf).all()
    assert not found.entropy[:, :, :3].any()
    assert not found.max_probability[:, :, :3].any()
    assert (found.argmax[:, :, :3] == -1).all()

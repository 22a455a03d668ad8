"""Each mask against a boolean matrix that plain loops build from its definition."""

import pytest
import torch
from attnlab_kernels import Emit, attention

from .strategies import DEVICE

BACKENDS = pytest.mark.parametrize("backend", ["dense", "tiled", "triton"])
B, N, M = 2, 9, 12
PREFIX = torch.tensor([0, 5])
QUERY_IDS = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2]] * B)
KEY_IDS = torch.tensor([[0] * 4 + [1] * 4 + [2] * 4, [1] * 6 + [0] * 6])
KEY_MASK = torch.tensor([[True] * 12, [False, False] + [True] * 7 + [False] * 3])
QUERY_MASK = torch.tensor([[False] * 3 + [True] * 6, [True] * 9])

CASES = {
    "everything": {},
    "causal": {"causal": True},
    "causal, more queries than keys see": {"causal": True, "query_offset": -4},
    "causal, far into a cache": {"causal": True, "query_offset": 30},
    "one-sided window": {"causal": True, "window": 3},
    "two-sided window": {"window": 2, "query_offset": 1},
    "window of one": {"causal": True, "window": 1, "query_offset": 0},
    "window and first tokens": {"causal": True, "window": 2, "first_tokens": 3},
    "two-sided window and first tokens": {"window": 2, "first_tokens": 2},
    "prefix": {"causal": True, "prefix": PREFIX},
    "prefix and window": {"causal": True, "window": 2, "prefix": PREFIX},
    "segments": {"causal": True, "segments": (QUERY_IDS, KEY_IDS)},
    "key mask": {"causal": True, "key_mask": KEY_MASK, "query_mask": QUERY_MASK},
    "key mask and window": {"window": 4, "first_tokens": 1, "key_mask": KEY_MASK, "prefix": PREFIX},
}


def visible(b: int, i: int, j: int, options: dict) -> bool:
    position = i + options.get("query_offset", M - N)
    causal = not options.get("causal") or j <= position
    near = "window" not in options or abs(position - j) < options["window"]
    inside = causal and (near or j < options.get("first_tokens", 0))
    if "prefix" in options:
        inside = inside or j < options["prefix"][b]
    if "segments" in options:
        inside = inside and options["segments"][0][b, i] == options["segments"][1][b, j]
    return bool(inside and ("key_mask" not in options or options["key_mask"][b, j]))


def on_device(value: object) -> object:
    if isinstance(value, tuple):
        return tuple(on_device(one) for one in value)
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


@BACKENDS
@pytest.mark.parametrize("name", CASES)
def test_a_mask_shows_what_its_definition_says(name: str, backend: str) -> None:
    options = CASES[name]
    torch.manual_seed(0)
    q, k, v = (torch.randn(*shape, device=DEVICE) for shape in ((B, 2, N, 4), (B, 1, M, 4), (B, 1, M, 4)))
    seen = torch.tensor([[[visible(b, i, j, options) for j in range(M)] for i in range(N)] for b in range(B)])
    seen, options = seen.to(DEVICE), {key: on_device(value) for key, value in options.items()}
    emit = Emit(rows=torch.arange(N, device=DEVICE), visible=True, key_sum=True, lse=True)
    out, found = attention(q, k, v, emit=emit, backend=backend, **options)
    expected = attention(q, k, v, mask=seen[:, None], query_mask=options.get("query_mask"), emit=emit, backend="dense")
    torch.testing.assert_close(out, expected.out)
    torch.testing.assert_close(found.lse, expected.emitted.lse)
    assert torch.equal(found.rows > 0, seen[:, None].expand(-1, 2, -1, -1))
    assert torch.equal(found.visible, seen[:, None].expand(-1, 2, -1, -1).sum(-1).float())
    counted = seen & options.get("query_mask", torch.ones(B, N, dtype=torch.bool, device=DEVICE))[..., None]
    assert torch.equal(found.key_count, counted[:, None].expand(-1, 2, -1, -1).sum(-2).float())


@BACKENDS
def test_a_bias_of_minus_infinity_hides(backend: str) -> None:
    q, k, v = torch.randn(3, B, 2, N, 4, device=DEVICE)
    mask = torch.rand(B, 1, N, N, device=DEVICE) < 0.5
    bias = torch.zeros(B, 1, N, N, device=DEVICE).masked_fill(~mask, -torch.inf)
    emit = Emit(visible=True, entropy=True, key_sum=True)
    out, found = attention(q, k, v, bias=bias, emit=emit, backend=backend)
    expected = attention(q, k, v, mask=mask, emit=emit, backend="dense")
    torch.testing.assert_close(out, expected.out)
    torch.testing.assert_close(found.entropy, expected.emitted.entropy)
    assert torch.equal(found.visible, expected.emitted.visible)
    assert torch.equal(found.key_count, expected.emitted.key_count)

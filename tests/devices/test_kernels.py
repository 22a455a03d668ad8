"""Every option and statistic of the kernels on a device that is not the CPU, against the same call on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from attnlab_kernels import Emit, RelativeBias, attention, gradient_products
from torch import Tensor
from torch.testing import assert_close

B, H, N_Q, N_K, D = 2, 4, 9, 12, 8
GENERATOR = torch.Generator().manual_seed(0)
CLOSE = {"rtol": 1e-3, "atol": 1e-3} if torch.cuda.is_available() else {}
"""A GPU rounds otherwise; what is pretended rounds as the CPU does."""


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def whole(high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=GENERATOR)


HALF = torch.arange(N_K).expand(B, -1) < torch.tensor([[N_K], [8]])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True, "query_offset": 2},
    "window": {"causal": True, "window": 4, "first_tokens": 2},
    "prefix": {"causal": True, "prefix": torch.tensor([3, 0])},
    "segments": {"segments": (whole(3, B, N_Q).sort(1).values, whole(3, B, N_K).sort(1).values)},
    "scattered segments": {"segments": (whole(3, B, N_Q), whole(3, B, N_K))},
    "padding": {"causal": True, "key_mask": HALF, "query_mask": HALF[:, -N_Q:]},
    "mask": {"mask": whole(2, 1, H, N_Q, N_K) > 0},
    "bias": {"bias": normal(H, N_Q, N_K)},
    "alibi": {"causal": True, "alibi": normal(H).abs()},
    "relative": {"relative_bias": RelativeBias(normal(8, H), True, 10)},
    "softcap and sinks": {"softcap": 3.0, "sinks": normal(H)},
    "sigmoid": {"normalizer": "sigmoid", "sigmoid_bias": -2.0, "causal": True},
    "sigmoid by head": {"normalizer": "sigmoid", "sigmoid_bias": normal(H)},
}
EMIT = Emit(
    lse=True, entropy=True, max_probability=True, argmax=True, collision=True, visible=True, key_sum=True,
    key_square=True, key_max=True, head_gram=True, key_probes=normal(B, N_K, 2), query_probes=normal(N_Q, 2),
    gather=whole(N_K, B, N_Q, 3), rows=torch.tensor([0, -1, 4]), columns=whole(N_K, B, 2), pool=(3, 4),
    offsets=([-5, -1, 0, 1, 4, 50], [0, 2]), top_k=3,
)  # fmt: skip
TENSORS = ("key_probes", "query_probes", "gather", "rows", "columns")
LEARNED = ("bias", "alibi", "sinks", "sigmoid_bias")


def moved(value: Any, device: Any) -> Any:
    """A value with its tensors on a device."""
    if isinstance(value, RelativeBias):
        return value._replace(table=value.table.to(device))
    if isinstance(value, Tensor):
        return value.to(device)
    return type(value)(moved(each, device) for each in value) if isinstance(value, tuple) else value


def on(device: Any, options: dict[str, Any], emit: Emit) -> tuple[list[Tensor], dict[str, Any], Emit]:
    """The call's arguments on a device, the learned ones with gradients."""
    torch.manual_seed(1)
    qkv = [torch.randn(B, h, n, D).to(device).requires_grad_() for h, n in ((H, N_Q), (2, N_K), (2, N_K))]
    options = {name: moved(value, device) for name, value in options.items()}
    for name in LEARNED:
        if isinstance(options.get(name), Tensor):
            options[name] = options[name].detach().clone().requires_grad_()
    asked = {name: moved(getattr(emit, name), device) for name in TENSORS}
    return qkv, options, replace(emit, **{name: t for name, t in asked.items() if t is not None})


def everything(device: Any, options: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """Output, statistics and gradients of one call."""
    qkv, options, emit = on(device, options, EMIT)
    out, emitted = attention(*qkv, **options, emit=emit, backend=backend)
    found = {"out": out}
    for name, value in vars(emitted).items():
        for i, each in enumerate(value if isinstance(value, tuple) else (value,)):
            if each is not None:
                found[f"{name}.{i}"] = each
    loss = out.square().sum() + emitted.entropy.sum() + emitted.key_probes.sum()
    loss.backward()
    learned = {**dict(zip("qkv", qkv, strict=True)), **{name: options[name] for name in LEARNED if name in options}}
    found |= {f"d {name}": t.grad for name, t in learned.items() if isinstance(t, Tensor)}
    return found


def agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert value.is_cuda, key
        assert_close(value.cpu(), expected[key], equal_nan=True, **CLOSE, msg=lambda said, key=key: f"{key}: {said}")


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_call_gives_on_the_device_what_it_gives_on_the_cpu(name, backend, device):
    agree(everything(device, OPTIONS[name], backend), everything("cpu", OPTIONS[name], backend))


@pytest.mark.parametrize("name", ["padding", "relative"])
def test_what_triton_is_launched_with_is_on_the_device(name, device):
    agree(everything(device, OPTIONS[name], "triton"), everything("cpu", OPTIONS[name], "tiled"))


@pytest.mark.parametrize("function", ["relevance", "loss_change"])
@pytest.mark.parametrize("backend", ["dense", "tiled", "triton"])
def test_gradient_products_are_computed_on_the_device(backend, function, device):
    right, left = normal(B, N_K, 2), normal(N_Q, 2)

    def products(place: Any, backend: str) -> dict[str, Tensor]:
        qkv, options, _ = on(place, OPTIONS["padding"], Emit())
        grad, x, y = (t.to(place) for t in (torch.ones(B, H, N_Q, D), right, left))
        more = {"function": function, "pool": 4, "right": x, "left": y, "backend": backend}
        return vars(gradient_products(*(t.detach() for t in qkv), grad, **more, **options))

    agree(products(device, backend), products("cpu", "tiled"))


def test_an_argument_elsewhere_is_named(device):
    q = torch.ones(1, 1, 4, 8, device=device)
    with pytest.raises(ValueError, match="key_mask is on cpu and q on cuda:0; expected one device"):
        attention(q, q, q, key_mask=torch.ones(1, 4) > 0)
    with pytest.raises(ValueError, match="rows is on cpu and q on cuda:0; expected one device"):
        attention(q, q, q, emit=Emit(rows=torch.tensor([0])))

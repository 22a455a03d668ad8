"""What the GPU benchmark compares with: that its masks are the kernels' masks, and that it sees what is wrong."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from attnlab_kernels import Emit, attention
from attnlab_kernels.resolve import resolve_problem

MASKS = ("full", "causal", "sliding window", "packed documents", "prefix", "sink + window")


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import gpu_cases

    return gpu_cases


@pytest.fixture
def oracle(cases: ModuleType) -> ModuleType:
    import gpu_oracle

    return gpu_oracle


@pytest.mark.parametrize("name", MASKS)
def test_peers_are_given_the_mask_of_the_kernels(cases: ModuleType, name: str) -> None:
    mask, size = cases.MASKS[name], cases.Size(2, 40, 40)
    qkv = torch.zeros(3, 2, 1, 40, 4)
    visible = resolve_problem(*qkv, **mask.options(size, "cpu")).visible()
    expected = torch.ones(2, 1, 40, 40, dtype=torch.bool) if visible is None else visible.expand(2, 1, 40, 40)
    if mask.modifier is not None:
        assert torch.equal(cases.visible_matrix(mask, size, "cpu").expand(2, 1, 40, 40), expected)
    # The protocol counts half a square when causal, without the diagonal's other half.
    counted = float(expected[0].sum()) - (20 if name == "causal" else 0)
    assert mask.visible(size) == counted


@pytest.mark.parametrize("name", MASKS)
def test_right_results_pass_and_each_wrong_one_is_named(cases: ModuleType, oracle: ModuleType, name: str) -> None:
    size = cases.Size(2, 90, 90)
    x = cases.Inputs.draw(cases.Shape("", 4, 2, 8), size, torch.float32, "cpu")
    options = cases.MASKS[name].options(size, "cpu")
    judge = oracle.Oracle(x.qkv, options)
    emits = [*cases.forward_emits(size, "cpu").values(), *cases.pass_emits(size).values()]
    for emit in [*emits, Emit(key_max=True, pool=7, offsets=[-90, 0, 3, 20])]:
        out, emitted = attention(*x.qkv, **options, emit=emit, backend="tiled")
        assert judge.wrong(out, emitted, emit) == []
        for field, value in vars(emitted).items():
            if value is None or field in ("pooled_count", "argmax"):
                continue
            spoilt = value.clone()
            spoilt[0, 0].view(-1)[-1] += 0.01 * value.abs().max()
            [wrong] = judge.wrong(out, replace(emitted, **{field: spoilt}), emit)
            assert wrong.startswith(f"{field} is off by ")
        out[0, 0, -1, -1] = torch.nan
        [wrong] = judge.wrong(out, emitted, emit)
        assert wrong.startswith("out is off by nan")


def test_a_wrong_argmax_is_named(cases: ModuleType, oracle: ModuleType) -> None:
    x = cases.Inputs.draw(cases.Shape("", 2, 2, 8), cases.Size(1, 40, 40), torch.float32, "cpu")
    emit = Emit(argmax=True)
    out, emitted = attention(*x.qkv, emit=emit, backend="tiled")
    spoilt = replace(emitted, argmax=(emitted.argmax + 1) % 40)
    assert oracle.Oracle(x.qkv, {}).wrong(out, emitted, emit) == []
    assert [text.split()[0] for text in oracle.Oracle(x.qkv, {}).wrong(out, spoilt, emit)] == ["argmax"]


def test_wrong_gradients_are_named(cases: ModuleType, oracle: ModuleType) -> None:
    x = cases.Inputs.draw(cases.Shape("", 4, 2, 8), cases.Size(1, 40, 40), torch.float32, "cpu")
    leaves = [t.requires_grad_() for t in x.qkv]
    right = torch.autograd.grad(attention(*leaves, causal=True, backend="dense").out, leaves, x.grad)
    judge = oracle.Oracle(tuple(t.detach() for t in leaves), {"causal": True})
    assert judge.wrong_gradients(right, x.grad) == []
    for number, name in enumerate("qkv"):
        wrong = [grad + 0.01 * (place == number) for place, grad in enumerate(right)]
        [text] = judge.wrong_gradients(tuple(wrong), x.grad)
        assert text.startswith(f"gradient of {name} is off by ")

"""The union of needs: every share equals what a separate call emits."""

from dataclasses import fields

import pytest
import torch
from attnlab_kernels import Emit, Emitted, attention
from hypothesis import given, settings
from hypothesis import strategies as st

from attnlab.runs.analysis import Needs
from attnlab.runs.union import unite

B, H, N, D = 2, 3, 7, 8


def _emit(generator: torch.Generator, wanted: frozenset[str]) -> Emit:
    def whole(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(-1, high, shape, generator=generator)

    def real(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    values = {
        "key_probes": [real(N, 2), real(B, N, 1), real(B, H, N, 3)],
        "query_probes": [real(B, N, 1), real(N, 2), real(B, H, N, 1)],
        "gather": [whole(N, B, N, 2), whole(N, B, N, 1)],
        "rows": [whole(N, 2), whole(N, B, 3)],
        "columns": [whole(N, B, 1), whole(N, 2)],
        "pool": [2, (3,), (2, 4)],
        "offsets": [[0, 1, 4], (0, 2, 7), ((0, 1, 4), (-3, 0, 3))],
        "top_k": [1, 3, 9],
    }
    chosen = {}
    for name in sorted(wanted):
        options = values.get(name, [True])
        chosen[name] = options[int(torch.randint(0, len(options), (), generator=generator))]
    return Emit(**chosen)


def _assert_same(got: Emitted, expected: Emitted) -> None:
    for field in fields(Emitted):
        a, b = getattr(got, field.name), getattr(expected, field.name)
        if b is None:
            assert a is None, field.name
            continue
        assert type(a) is type(b), field.name
        for x, y in zip(a, b, strict=True) if isinstance(b, tuple) else [(a, b)]:
            torch.testing.assert_close(x, y, msg=lambda m, name=field.name: f"{name}: {m}")


_NAMES = sorted(field.name for field in fields(Emit))


@settings(max_examples=60, deadline=None)
@given(
    wanted=st.lists(st.none() | st.frozensets(st.sampled_from(_NAMES), max_size=8), min_size=1, max_size=4),
    seed=st.integers(0, 10_000),
    learned_sinks=st.booleans(),
)
def test_each_share_is_what_a_separate_call_emits(
    wanted: list[frozenset[str] | None], seed: int, learned_sinks: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, B, H, N, D, generator=generator, dtype=torch.float64)
    sinks = torch.zeros(H, dtype=torch.float64) if learned_sinks else None
    needs = [None if names is None else Needs(_emit(generator, names)) for names in wanted]
    if all(need is None for need in needs):
        return
    union = unite(needs, B, H)
    together = attention(q, k, v, causal=True, sinks=sinks, emit=union.emit, backend="dense").emitted
    for need, share in zip(needs, union.shares, strict=True):
        assert (need is None) == (share is None)
        if need is not None and share is not None:
            alone = attention(q, k, v, causal=True, sinks=sinks, emit=need.emit, backend="dense").emitted
            _assert_same(share(together), alone)


def test_a_tensor_that_two_analyses_share_is_computed_once() -> None:
    probes = torch.randn(N, 4)
    union = unite([Needs(Emit(key_probes=probes)), Needs(Emit(key_probes=probes, lse=True))], B, H)
    assert union.emit.key_probes is probes


def test_equal_block_sizes_and_bins_are_computed_once() -> None:
    union = unite([Needs(Emit(pool=4, offsets=[0, 2])), Needs(Emit(pool=(4, 8), offsets=((0, 2),)))], B, H)
    assert union.emit.pool == (4, 8)
    assert union.emit.offsets == [0, 2]


@pytest.mark.parametrize(("first", "second", "expected"), [(False, True, True), (False, False, False)])
def test_qkv_and_loss_are_asked_for_where_any_analysis_wants_them(first: bool, second: bool, expected: bool) -> None:
    union = unite([Needs(qkv=first, loss=second), None, Needs(qkv=second, loss=first)], B, H)
    assert union.qkv is expected
    assert union.loss is expected

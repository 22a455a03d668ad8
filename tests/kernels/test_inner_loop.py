"""The tiled backend's inner steps against float64, in torch's interpreter and in Python, and what they leave behind."""

import math
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from attnlab_kernels import Emit, attention, strips
from attnlab_kernels.inner_loop import IN_PYTHON, NEAR_SCORES, Steps, _read_once, log_sigmoid, steps, tile_rows
from attnlab_kernels.tile_parts import Hiding, Logits, Numbers, Spending, Sums
from attnlab_kernels.workspace import SPARE_BYTES, _Spares

INTERPRETERS = pytest.mark.parametrize("run", [IN_PYTHON, steps()], ids=["python", "torchscript"])
B, N, G, NQ, NK, D = 2, 3, 2, 37, 50, 5
NEAR = pytest.mark.parametrize("near", [1, 800, 4000, 12000, NEAR_SCORES])
"""From a few rows of a head at a time to all batch rows."""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits(**changes: object) -> Logits:
    """A tile's, of every seventh key is hidden, and from key 40 on what a boolean mask says."""
    seventh = torch.zeros(1, 1, 1, 1, NK, dtype=torch.float64)
    seventh[..., ::7] = -math.inf
    mask = torch.where(random(1, 1, 1, NQ, 10, seed=1) > 0, 0.0, -math.inf)
    of = Logits(
        q=random(B, N, G, NQ, D) * 10,
        k=random(B, N, NK, D, seed=2),
        cap=0.0,
        terms=[],
        alpha=1.0,
        distances=None,
        slopes=None,
        sigmoid=False,
        sigmoid_bias=None,
        hiding=[Hiding(0, NK, seventh, False, False), Hiding(40, NK, mask, False, False)],
        fill=False,
        causal=False,
        offset=0,
        first=0,
    )
    return of._replace(**changes)


def by_definition(of: Logits) -> torch.Tensor:
    """[b, n, g, i, j]."""
    s = of.q @ of.k[:, :, None].mT
    s = s if of.cap == 0 else of.cap * torch.tanh(s)
    s = sum((term * of.alpha for term in of.terms), start=s)
    if of.distances is not None:
        s = s + of.distances * of.slopes
    if of.sigmoid:
        s = torch.nn.functional.logsigmoid(s if of.sigmoid_bias is None else s + of.sigmoid_bias)
    for part in of.hiding:
        keys = slice(part.first, part.last)
        s[..., keys] = s[..., keys].masked_fill(part.numbers == -math.inf, -math.inf)
    return s


def through_steps(
    run: Steps, of: Logits, near: int, kept: bool, spending: Spending | None = None, as_they_are: bool = False
) -> Sums:
    """All sums, of buffers that begin as NaN; argmax where weights that are sigmoids are not let be."""

    def column(dtype: torch.dtype = of.q.dtype) -> torch.Tensor:
        return torch.full((*of.q.shape[:4], 1), -7 if dtype == torch.long else math.nan, dtype=dtype)

    weights = torch.full((*of.q.shape[:4], of.k.shape[2]), math.nan, dtype=of.q.dtype) if kept else None
    best, largest = (None, column()) if as_they_are else (column(torch.long), None)
    sums = Sums(column(), column(), column(), largest, best, column(), weights)
    limits = torch.finfo(of.q.dtype)
    numbers = Numbers(
        unit=1.0, to_base_2=1 / math.log(2), lowest=limits.min, tiny=limits.tiny, flushes=False,
        precision=limits.eps, large_sigmoid=2.0**-20, near=near, least=4,
    )  # fmt: skip
    buffers = torch.full((2, of.q.shape[:4].numel() * of.k.shape[2]), math.nan, dtype=of.q.dtype)
    extremes = run.tile_rows(of, sums, spending, numbers, *buffers)
    torch.testing.assert_close(extremes, torch.stack(sums.top.aminmax()), rtol=0, atol=0, equal_nan=True)
    return sums


CHANGES = {
    "plain": {},
    "cap": {"cap": 4.0},
    "terms": {"terms": [random(1, N, G, NQ, NK, seed=3), random(B, 1, 1, 1, NK, seed=4)], "alpha": 2.0},
    "distances": {"distances": random(1, 1, 1, NQ, NK, seed=3).abs(), "slopes": random(1, N, G, 1, 1, seed=4)},
    "sigmoid": {"sigmoid": True, "sigmoid_bias": random(1, N, G, 1, 1, seed=4)},
    "fill": {"fill": True},
    "a mask for each head": {
        "hiding": [Hiding(0, NK, torch.where(random(B, N, G, NQ, NK, seed=5) > 0, 0.0, -math.inf), False, False)]
    },
}


@INTERPRETERS
@NEAR
@pytest.mark.parametrize("change", CHANGES)
def test_weights_and_sums_are_those_of_the_definition(run, near, change):
    of = logits(**CHANGES[change])
    s = by_definition(of)
    found = through_steps(run, of, near, kept=True)
    top = s.amax(-1, keepdim=True)
    t = s - top
    torch.testing.assert_close(found.top, top)
    torch.testing.assert_close(found.weights, torch.exp(t))
    torch.testing.assert_close(found.total, torch.exp(t).sum(-1, keepdim=True))
    inside = torch.where(t == -math.inf, 0, t)
    torch.testing.assert_close(found.product * math.log(2), (torch.exp(t) * inside).sum(-1, keepdim=True))
    torch.testing.assert_close(found.norm, torch.exp(t).norm(dim=-1, keepdim=True))
    torch.testing.assert_close(s.gather(-1, found.best), top)


@INTERPRETERS
@NEAR
@pytest.mark.parametrize(
    ("size", "bias"), [(1.0, 0.0), (0.05, -3.0), (0.05, -40.0)], ids=["near one", "between", "small"]
)
@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_sigmoids_as_they_are_sum_to_what_their_logarithms_do(run, near, size, bias, fill, added):
    of = logits(sigmoid=True, sigmoid_bias=random(1, N, G, 1, 1, seed=4) + bias, fill=fill)
    of = of._replace(q=of.q * size)
    if added:
        numbers = torch.where(random(1, 1, 1, NQ, NK, seed=5) > 0, random(1, 1, 1, NQ, NK, seed=6), -math.inf)
        of = of._replace(terms=[numbers], hiding=[Hiding(0, NK, numbers, True, False)])
    s = by_definition(of)
    a, top = torch.exp(s), s.amax(-1, keepdim=True)
    share = torch.exp(s - top)
    product = torch.special.xlogy(share, share).sum(-1, keepdim=True)
    out, key_sum, key_square, key_max = (
        torch.zeros(B, N, G, *rest, dtype=s.dtype) for rest in ((NQ, D), (NK,), (NK,), (NK,))
    )
    for kept in (True, False):
        spending = None if kept else Spending(of.k, out, None, None, key_sum, key_square, key_max)
        found = through_steps(run, of, near, kept, spending, as_they_are=True)
        torch.testing.assert_close(found.top, top)
        torch.testing.assert_close(found.total, share.sum(-1, keepdim=True))
        torch.testing.assert_close(found.product * math.log(2), product, rtol=1e-7, atol=1e-12)
        torch.testing.assert_close(found.norm, share.norm(dim=-1, keepdim=True))
        assert bool((found.largest == 1).all()) == (bias == -40)
        if kept:
            torch.testing.assert_close(found.weights, share * found.largest, rtol=1e-7, atol=1e-300)
            assert not found.weights[s == -math.inf].any()
    torch.testing.assert_close(out, a @ of.k[:, :, None], atol=1e-7 * float(a.max()), rtol=1e-7)
    torch.testing.assert_close(key_sum, a.sum(-2), atol=0, rtol=1e-7)
    torch.testing.assert_close(key_square, a.square().sum(-2), atol=0, rtol=1e-7)
    torch.testing.assert_close(key_max, a.amax(-2), atol=0, rtol=1e-7)


@INTERPRETERS
@NEAR
@pytest.mark.parametrize("change", ["plain", "sink", "sigmoid", "padding", "padding that holds NaN"])
def test_weights_are_read_and_summed_over_queries(run, near, change):
    of = logits(**CHANGES["sigmoid"] if change == "sigmoid" else {})
    sink = random(1, N, G, 1, 1, seed=6) * 5 if change == "sink" else None
    padding = random(B, 1, 1, NQ, 1, seed=7) > 0.5 if change.startswith("padding") else None
    s = by_definition(of)
    a = torch.exp(s) if of.sigmoid else torch.softmax(s, -1)
    if sink is not None:
        a = torch.softmax(torch.cat([s, sink.expand(B, N, G, NQ, 1)], -1), -1)[..., :-1]
    if change.endswith("NaN"):
        of.q.masked_fill_(padding, math.nan)
    counted = a if padding is None else a.masked_fill(padding, 0)
    v = random(B, N, NK, 6, seed=8)
    out, key_sum, key_square, key_max = (
        torch.zeros(B, N, G, *rest, dtype=s.dtype) for rest in ((NQ, 6), (NK,), (NK,), (NK,))
    )
    through_steps(run, of, near, False, Spending(v, out, sink, padding, key_sum, key_square, key_max))
    whole = torch.ones_like(out, dtype=torch.bool) if padding is None else ~padding.expand_as(out)
    torch.testing.assert_close(out[whole], (a @ v[:, :, None])[whole])
    torch.testing.assert_close(key_sum, counted.sum(-2))
    torch.testing.assert_close(key_square, counted.square().sum(-2))
    torch.testing.assert_close(key_max, counted.amax(-2))


@INTERPRETERS
@NEAR
@pytest.mark.parametrize(("offset", "first"), [(13, 0), (20, 0), (13, 30), (-5, 0)])
def test_keys_that_causality_hides_are_left_out(run, near, offset, first):
    seen = torch.arange(NQ)[:, None] + offset >= torch.arange(NK)
    seen |= torch.arange(NK) < first
    start = max(0, first if first else offset + 1)
    hiding = torch.where(seen, 0.0, -math.inf).double()[None, None, None, :, start:]
    parts = [Hiding(start, NK, hiding, added=False, by_causality=first == 0)]
    of = logits(hiding=parts, causal=True, offset=offset, first=first)
    s = by_definition(of)
    found = through_steps(run, of, near, kept=True)
    empty = ~seen.any(-1)
    assert bool(empty.any()) == (offset < 0)
    torch.testing.assert_close(found.top, s.amax(-1, keepdim=True))
    torch.testing.assert_close(found.weights[..., ~empty, :], torch.exp(s - s.amax(-1, keepdim=True))[..., ~empty, :])
    assert not found.weights[..., empty, :].any()
    out, key_sum = torch.zeros(B, N, G, NQ, D, dtype=s.dtype), torch.zeros(B, N, G, NK, dtype=s.dtype)
    through_steps(run, of, near, False, Spending(of.k, out, None, None, key_sum, None, None))
    a = torch.where(seen, torch.softmax(s, -1), 0).masked_fill(empty[:, None], 0)
    torch.testing.assert_close(out, a @ of.k[:, :, None])
    torch.testing.assert_close(key_sum, a.sum(-2))


@INTERPRETERS
def test_small_steps_give_what_torch_gives(run):
    s = random(37, 50) * 30
    squashed = s.clone()
    log_sigmoid(squashed, torch.empty_like(s))
    torch.testing.assert_close(squashed, torch.nn.functional.logsigmoid(s))
    p, factor = torch.rand(2, 3, 11, 7), torch.rand(2, 3, 11, 1)
    square, largest = torch.zeros(2, 3, 7), torch.zeros(2, 3, 7)
    run.spend_over_queries(p.clone(), factor, square, largest, 100)
    torch.testing.assert_close(square, (p * factor).square().sum(-2))
    torch.testing.assert_close(largest, (p * factor).amax(-2))


@INTERPRETERS
def test_a_learned_sink_is_one_more_logit_of_the_softmax(run):
    s, sink = random(37, 50) * 30, torch.tensor([[1.5]], dtype=torch.float64)
    s[:, ::7] = -math.inf
    top = s.amax(-1, keepdim=True)
    total = torch.exp(s - top).sum(-1, keepdim=True)
    own = torch.special.entr(torch.softmax(s, -1)).sum(-1, keepdim=True)
    lse, share, entropy = run.with_sink(sink.expand(37, 1), top, total, own)
    both = torch.cat([s, sink.expand(37, 1)], -1)
    torch.testing.assert_close(lse[:, 0], torch.logsumexp(both, -1))
    torch.testing.assert_close(share[:, 0], 1 - torch.softmax(both, -1)[:, -1])
    torch.testing.assert_close(entropy[:, 0], torch.special.entr(torch.softmax(both, -1)).sum(-1))


def test_torch_has_an_interpreter_for_the_steps_or_python_runs_them(monkeypatch):
    assert steps().tile_rows is not tile_rows

    def gone(step):
        raise AttributeError("script")

    monkeypatch.setattr(torch.jit, "script", gone)
    assert _read_once.__wrapped__() is IN_PYTHON


@pytest.mark.parametrize("worth", [1 << 60, 1], ids=["in this thread", "on the cores"])
def test_a_call_leaves_tiny_numbers_as_it_found_them(worth, monkeypatch):
    monkeypatch.setattr(strips, "WORTH_THREADS", worth)
    tiny = torch.full((64,), 1e-40)
    attention(*torch.randn(3, 1, 2, 700, 8), emit=Emit(entropy=True), backend="tiled")
    assert bool((tiny * 1 > 0).all())


def test_who_wants_tiny_numbers_as_zero_keeps_that_whatever_the_default_type():
    tiny = torch.full((64,), 1e-40)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.set_flush_denormal(True)
        attention(*torch.randn(3, 1, 2, 64, 8), backend="tiled")
        assert bool((tiny * 1 == 0).all())
    finally:
        torch.set_flush_denormal(False)
        torch.set_default_dtype(torch.float32)


def test_cores_that_ask_for_the_steps_at_once_leave_warnings_as_they_were(monkeypatch):
    def slow(step):
        time.sleep(0.002)
        return step

    monkeypatch.setattr(torch.jit, "script", slow)
    before = list(warnings.filters)
    for cached in (steps, _read_once):
        cached.cache_clear()
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: steps(), range(4)))
    finally:
        for cached in (steps, _read_once):
            cached.cache_clear()
    assert warnings.filters == before
    assert all(one is found[0] for one in found)


def test_a_row_of_nan_costs_the_others_no_digits():
    generator = torch.Generator().manual_seed(0)

    def whole(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator).float()

    # Logits of some thousands, all whole numbers, and keys that differ by a few.
    q, k = whole(-120, 121, 1, 1, 64, 8), whole(-40, 41, 1, 1, 1, 8).repeat(1, 1, 64, 1)
    q[..., :2] = whole(0, 2, 1, 1, 64, 2)
    k[..., :2] += whole(0, 2, 1, 1, 64, 2)
    exact = torch.distributions.Categorical(logits=q.double() @ k.double().mT).entropy()
    q[0, 0, 5] = math.nan
    found = attention(q, k, k, scale=1.0, emit=Emit(entropy=True), backend="tiled").emitted.entropy.double()
    others = torch.arange(64) != 5
    torch.testing.assert_close(found[..., others], exact[..., others], rtol=1e-6, atol=1e-6)


def test_weights_that_underflow_cost_no_digits():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 600, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    q *= 40
    emit = Emit(entropy=True, key_sum=True)
    exact = attention(q, k, v, emit=emit, backend="dense")
    found = attention(q.float(), k.float(), v.float(), emit=emit, backend="tiled")
    dense = attention(q.float(), k.float(), v.float(), emit=emit, backend="dense")
    for name in ("entropy", "key_sum"):
        error, bound = (
            (getattr(got.emitted, name) - getattr(exact.emitted, name)).abs().max() for got in (found, dense)
        )
        assert error <= 2 * bound + 1e-6


def test_spare_buffers_are_lent_once_and_do_not_grow_without_limit():
    spares = _Spares()
    first = torch.empty(8)
    spares.give_back({"scores": first})
    assert spares.borrow(torch.float64) == {}
    assert spares.borrow(torch.float32)["scores"] is first
    assert spares.borrow(torch.float32) == {}
    whole = SPARE_BYTES // 4
    spares.give_back({"scores": torch.empty(whole), "shares": torch.empty(1)})
    assert list(spares.borrow(torch.float32)) == ["scores"]
    spares.give_back({"scores": torch.empty(whole)})
    latest = torch.empty(whole // 2, dtype=torch.float64)
    spares.give_back({"scores": latest})
    assert spares.borrow(torch.float32) == {}
    assert spares.borrow(torch.float64)["scores"] is latest


def test_buffers_made_in_inference_mode_serve_outside_it_too():
    qkv = torch.randn(3, 1, 2, 40, 8)
    with torch.inference_mode():
        inside = attention(*qkv, emit=Emit(entropy=True), backend="tiled").emitted.entropy
    outside = attention(*qkv, emit=Emit(entropy=True), backend="tiled").emitted.entropy
    assert torch.equal(inside, outside)

"""The inner loop of backend `tiled`: a tile's logits become weights, and each row is summed.

A few rows at a time, so that all steps after the first find them in the core's own cache. Steps are then so short that
with several cores at work Python's lock, which every operation gives up and takes back, costs half as much as they do:
so the loop runs in torch's own interpreter (TorchScript) where torch has one, and in Python where not.
"""

import math
import threading
import warnings
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

NEAR_SCORES = 1 << 18
"""Scores that go through all steps at a time: 1 MB of float32 and as much of weights, which stay near a core."""

LEAST_ROWS = 16
"""Rows of a product with the keys, however many keys there are: fewer starve it."""


class Logits(NamedTuple):
    """What a tile's logits are made of, in units of `unit`. Heads are split into n key heads and g heads of each.

    Attributes:
        q: [b, n, g, i, d], times the scale. k: [b, n, j, d].
        cap: the soft cap, 0 for none.
        terms: [b or 1, n or 1, g or 1, i or 1, j or 1], added after the cap, times `alpha`.
        distances: shaped alike, added times `slopes` [1, n, g, 1, 1].
        sigmoid: whether logits are to be ln sigmoid. sigmoid_bias: [1, n, g, 1, 1], added before that.
        direct: whether the weights are to be the sigmoids themselves instead, of logits in units of -ln 2.
        places: from where to where there are keys that are hidden from some row.
        hiding: shaped as terms with those keys alone, 0 or -inf. Those of `hidden_by_terms` have been added already, of
            those of `by_causality` row i sees all keys up to i + offset.
        fill: whether what is hidden may hold infinity or NaN, which -inf does not hide by being added.
        causal: whether row i sees no key from i + offset + 1 on but the `first` ones.
    """

    q: Tensor
    k: Tensor
    cap: float
    terms: list[Tensor]
    alpha: float
    distances: Tensor | None
    slopes: Tensor | None
    sigmoid: bool
    sigmoid_bias: Tensor | None
    direct: bool
    places: list[tuple[int, int]]
    hiding: list[Tensor]
    hidden_by_terms: list[bool]
    by_causality: list[bool]
    fill: bool
    causal: bool
    offset: int
    first: int


class Sums(NamedTuple):
    """Takes what each row sums to, [b, n, g, i, 1], and the weights where they are kept.

    Attributes:
        top, total, product: the largest logit, the sum of e^t and that of t e^t, with t = logit - largest logit, in the
            logits' units times `to_base_2`. Of direct sigmoids A the largest, the sum, and that of A log2 A.
        best: the place of the largest. norm: the square root of the sum of e^2t.
        weights: [b, n, g, i, j], e^t, 0 where hidden.
    """

    top: Tensor
    total: Tensor
    product: Tensor | None
    best: Tensor | None
    norm: Tensor | None
    weights: Tensor | None


class Spending(NamedTuple):
    """What the weights are for, where they are not kept. A = e^t times a factor of its row.

    Attributes:
        v: [b, n, j, dv]. out: [b, n, g, i, dv], takes A V.
        sink: [1, n, g, 1, 1], a learned sink's logit.
        padding: [b, 1, 1, i, 1], True for queries that do not count.
        key_sum, key_square, key_max: [b, n, g, j], to which sums of A, of A^2 and the largest A over queries are added.
    """

    v: Tensor
    out: Tensor
    sink: Tensor | None
    padding: Tensor | None
    key_sum: Tensor | None
    key_square: Tensor | None
    key_max: Tensor | None


class Numbers(NamedTuple):
    """Constants of a call.

    Attributes:
        unit: of the logits, and `to_base_2` what they are to be multiplied by to be powers of two.
        lowest: the lowest finite number.
        tiny: weights below it are written as 0; 0 where the processor does that.
        near: how many scores to take at a time, and `least` how many rows of a head at least.
    """

    unit: float
    to_base_2: float
    lowest: float
    tiny: float
    near: int
    least: int


def tile_rows(of: Logits, sums: Sums, spending: Spending | None, numbers: Numbers, s: Tensor, p: Tensor) -> Tensor:
    """Take a tile through all steps, a few rows at a time, and return the extremes of `sums.top`, NaN if it holds one.

    Args:
        of, sums, spending, numbers: see there.
        s, p: buffers of `chunk_scores` entries. Weights that are kept do not need the second.
    """
    q, keys = of.q, of.k.size(2)
    b, n, g, i = q.size(0), q.size(1), q.size(2), q.size(3)
    rows = max(1, numbers.near // max(1, keys))
    queries, group = min(i, max(numbers.least, rows // numbers.least * numbers.least)), min(g, max(1, rows // i))
    heads, batches = min(n, max(1, rows // (i * g))), min(b, max(1, rows // (i * g * n)))
    for b0 in range(0, b, batches):
        for n0 in range(0, n, heads):
            for g0 in range(0, g, group):
                at = [b0, min(b, b0 + batches), n0, min(n, n0 + heads), g0, min(g, g0 + group)]
                its, its_sums = _logits_of_heads(of, at), _sums_of_heads(sums, at)
                spends = None if spending is None else _spending_of_heads(spending, at)
                k_t = its.k.flatten(0, 1).transpose(1, 2)
                for start in range(0, i, queries):
                    stop, width = min(i, start + queries), keys
                    if of.causal:
                        width = max(0, min(keys, max(of.first, stop + of.offset)))
                    t = _chunk_logits(its, k_t, start, stop, width, s, p)
                    weight, top, total = _chunk_weights(t, its, its_sums, numbers, start, stop, p)
                    if spends is not None:
                        _spend(weight, top, total, spends, start, stop, of, numbers)
    return torch.stack([sums.top.amin(), sums.top.amax()])


def chunk_scores(of: Logits, numbers: Numbers) -> int:
    """How many entries a buffer needs."""
    keys = of.k.shape[2]
    return min(of.q.shape[:4].numel() * keys, max(numbers.near, numbers.least * keys))


def _of_heads(x: Tensor, at: list[int]) -> Tensor:
    """Some batch rows, key heads and heads of each, of [b or 1, n or 1, g or 1, ...]."""
    for dim in range(min(3, x.dim())):
        length = at[2 * dim + 1] - at[2 * dim]
        if x.size(dim) > length:
            x = x.narrow(dim, at[2 * dim], length)
    return x


def _if_any(x: Tensor | None, at: list[int]) -> Tensor | None:
    return None if x is None else _of_heads(x, at)


def _of_key_heads(x: Tensor, at: list[int]) -> Tensor:
    """The same of [b, n, ...]."""
    return x.narrow(0, at[0], at[1] - at[0]).narrow(1, at[2], at[3] - at[2])


def _logits_of_heads(of: Logits, at: list[int]) -> Logits:
    return Logits(
        _of_heads(of.q, at), _of_key_heads(of.k, at), of.cap, [_of_heads(x, at) for x in of.terms], of.alpha,
        _if_any(of.distances, at), _if_any(of.slopes, at), of.sigmoid, _if_any(of.sigmoid_bias, at), of.direct,
        of.places, [_of_heads(x, at) for x in of.hiding], of.hidden_by_terms, of.by_causality, of.fill, of.causal,
        of.offset, of.first,
    )  # fmt: skip


def _sums_of_heads(sums: Sums, at: list[int]) -> Sums:
    return Sums(
        _of_heads(sums.top, at), _of_heads(sums.total, at), _if_any(sums.product, at), _if_any(sums.best, at),
        _if_any(sums.norm, at), _if_any(sums.weights, at),
    )  # fmt: skip


def _spending_of_heads(of: Spending, at: list[int]) -> Spending:
    return Spending(
        _of_key_heads(of.v, at), _of_heads(of.out, at), _if_any(of.sink, at), _if_any(of.padding, at),
        _if_any(of.key_sum, at), _if_any(of.key_square, at), _if_any(of.key_max, at),
    )  # fmt: skip


def _of_rows(x: Tensor, start: int, stop: int) -> Tensor:
    """Some queries of [b, n, g, i or 1, ...]."""
    return x.narrow(3, start, stop - start) if x.size(3) > stop - start else x


def _columns(x: Tensor, start: int, stop: int) -> Tensor:
    """Some keys of [..., j or 1]."""
    return x.narrow(-1, start, stop - start) if x.size(-1) > stop - start else x


def _hidden_span(of: Logits, number: int, start: int, width: int) -> tuple[int, int]:
    """From where to where keys are hidden from some of the rows that begin at `start` and have `width` keys."""
    first, last = of.places[number]
    if of.by_causality[number]:
        first = max(first, start + of.offset + 1)
    return first, min(last, width)


def _chunk_logits(of: Logits, k_t: Tensor, start: int, stop: int, width: int, s: Tensor, p: Tensor) -> Tensor:
    """[b, n, g, i, width] logits of some queries, -inf where hidden, in the buffer `s`."""
    q = _of_rows(of.q, start, stop)
    b, n, g, i = q.size(0), q.size(1), q.size(2), q.size(3)
    flat = s[: b * n * g * i * width].view(b * n, g * i, width)
    torch.bmm(q.reshape(b * n, g * i, q.size(4)), _columns(k_t, 0, width), out=flat)
    t = flat.view(b, n, g, i, width)
    if of.cap != 0.0:
        t.tanh_().mul_(of.cap)
    for term in of.terms:
        t.add_(_columns(_of_rows(term, start, stop), 0, width), alpha=of.alpha)
    distances, slopes = of.distances, of.slopes
    if distances is not None and slopes is not None:
        t.addcmul_(_columns(_of_rows(distances, start, stop), 0, width), slopes)
    if of.sigmoid:
        bias = of.sigmoid_bias
        if bias is not None:
            t.add_(bias)
        if not of.direct:
            log_sigmoid(t, p[: t.numel()].view(t.size()))
    for number, hiding in enumerate(of.hiding):
        first, last = _hidden_span(of, number, start, width)
        if first < last and (of.fill or not of.hidden_by_terms[number]):
            begins = of.places[number][0]
            hidden = _columns(_of_rows(hiding, start, stop), first - begins, last - begins)
            there = _columns(t, first, last)
            if of.fill:
                there.masked_fill_(hidden == -math.inf, -math.inf)
            elif of.direct:
                there.sub_(hidden)
            else:
                there.add_(hidden)
    return t


def _chunk_weights(
    t: Tensor, of: Logits, sums: Sums, numbers: Numbers, start: int, stop: int, p: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Write e^t, sum the rows, and return weights [b, n, g, i, width], tops and totals; the logits `t` are spent."""
    width = t.size(-1)
    kept, product, best, norm = sums.weights, sums.product, sums.best, sums.norm
    if kept is not None:
        mine = _of_rows(kept, start, stop)
        mine.narrow(-1, width, mine.size(-1) - width).zero_()
        weight = mine.narrow(-1, 0, width)
    else:
        weight = p[: t.numel()].view(t.size())
    top, total = _of_rows(sums.top, start, stop), _of_rows(sums.total, start, stop)
    if width == 0:
        top.fill_(-math.inf)
        total.zero_()
        for nothing in (product, norm):
            if nothing is not None:
                _of_rows(nothing, start, stop).zero_()
        if best is not None:
            _of_rows(best, start, stop).zero_()
        return weight, top, total
    if of.direct:
        torch.reciprocal(t.exp2_().add_(1.0), out=weight)
        torch.amax(weight, [-1], True, out=top)
    elif best is None:
        torch.amax(t, [-1], True, out=top)
    else:
        largest, place = torch.max(t, -1, True)
        top.copy_(largest)
        _of_rows(best, start, stop).copy_(place)
    if not of.direct:
        t.sub_(top.clamp(min=numbers.lowest))
        if numbers.to_base_2 != 1.0:
            t.mul_(numbers.to_base_2)
        torch.exp2(t, out=weight)
    if numbers.tiny > 0:
        # Products of numbers too small to be normal take a hundred times as long, and as shares these are nothing.
        torch.threshold_(weight, numbers.tiny, 0.0)
    torch.sum(weight, [-1], True, out=total)
    if product is not None:
        hides = False
        for number in range(len(of.places)):
            first, last = _hidden_span(of, number, start, width)
            if first < last:
                hides = True
                if of.direct:
                    # The logarithm of infinity takes it forty times as long.
                    _columns(t, first, last).clamp_(max=-numbers.lowest)
        if of.direct:
            t.log2_()
        t.mul_(weight)
        its = _of_rows(product, start, stop)
        if of.direct:
            its.copy_(torch.nansum(t, [-1], True).neg_())
        elif hides:
            # Infinity times 0 is NaN, where hidden; a row that is NaN elsewhere has a total that says so.
            its.copy_(torch.nansum(t, [-1], True))
        else:
            torch.sum(t, [-1], True, out=its)
    if norm is not None:
        _of_rows(norm, start, stop).copy_(torch.linalg.vector_norm(weight, dim=[-1], keepdim=True))
    return weight, top, total


def _spend(
    weight: Tensor, top: Tensor, total: Tensor, on: Spending, start: int, stop: int, of: Logits, numbers: Numbers
) -> None:
    """Read values by the weights of some queries and add them over these; weights are spent."""
    b, n, g, i, width = weight.size(0), weight.size(1), weight.size(2), weight.size(3), weight.size(4)
    sink, padding, v = on.sink, on.padding, on.v.flatten(0, 1)
    if of.direct:
        factor = torch.ones_like(top)
    elif of.sigmoid:
        factor = torch.exp(top * numbers.unit)
    else:
        # A row's largest weight is 1, so that only a row that sees no key has less.
        whole = total.clamp(min=1.0)
        if sink is not None:
            whole = whole + torch.exp(sink - top.clamp(min=numbers.lowest) * numbers.unit)
        factor = whole.reciprocal()
    read = torch.bmm(weight.view(b * n, g * i, width), v.narrow(1, 0, width)).view(b, n, g, i, v.size(-1))
    _of_rows(on.out, start, stop).copy_(read.mul_(factor))
    if padding is not None:
        unread = _of_rows(padding, start, stop)
        if bool((factor.isnan() & unread).any()):
            # 0 times NaN is NaN, and whatever padding holds must not reach a statistic.
            weight.masked_fill_(unread, 0.0)
        factor = factor.masked_fill(unread, 0.0)
    key_sum, key_square, key_max = on.key_sum, on.key_square, on.key_max
    if key_sum is not None:
        here = torch.bmm(factor.reshape(b * n * g, 1, i), weight.view(b * n * g, i, width))
        _columns(key_sum, 0, width).add_(here.view(b, n, g, width))
    if key_square is not None or key_max is not None:
        if padding is not None or not of.direct:
            weight.mul_(factor)
        if key_max is not None:
            largest = _columns(key_max, 0, width)
            torch.maximum(largest, weight.amax(-2), out=largest)
        if key_square is not None:
            _columns(key_square, 0, width).add_(weight.square_().sum(-2))


def row_results(
    top: Tensor,
    total: Tensor,
    product: Tensor | None,
    unit: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of sums from `exponentials`: the largest logit, lse, 1 / total, and the entropy; for rows that see a key."""
    top = top * unit
    log_total = torch.log(total)
    entropy: Tensor | None = None
    if product is not None:
        entropy = torch.addcdiv(log_total, product, total, value=-0.6931471805599453)
    return top, top + log_total, total.reciprocal(), entropy


def with_sink(sink: Tensor, top: Tensor, total: Tensor, entropy: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Lse and entropy with one more logit, and the share that is left to the keys.

    The entropy follows by grouping: that of the choice between keys and sink, plus the keys' own times their share.
    """
    pivot = torch.maximum(top, sink)
    pivot = torch.where(pivot == -math.inf, torch.zeros_like(pivot), pivot)
    keys, other = top - pivot + torch.log(total), sink - pivot
    log_sum = torch.log(torch.exp(keys) + torch.exp(other))
    share = torch.exp(keys - log_sum)
    if entropy is not None:
        entropy = share * entropy + torch.special.entr(share) + torch.special.entr(torch.exp(other - log_sum))
    return pivot + log_sum, share, entropy


def log_sigmoid(x: Tensor, spare: Tensor) -> None:
    """Write ln sigmoid(x) = min(x, 0) - ln(1 + e^-|x|) over x; torch's own takes three times as long."""
    torch.abs(x, out=spare)
    spare.mul_(-1.4426950408889634).exp2_().add_(1.0).log_()
    x.clamp_(max=0.0).sub_(spare)


def spend_over_queries(p: Tensor, factor: Tensor, square: Tensor | None, largest: Tensor | None, near: int) -> None:
    """Add the squares of A = p * factor over queries to `square`, and take its maxima into `largest`; p is spent.

    Args:
        p: [b, h, i, j]; factor: [b, h, i, 1]; square, largest: [b, h, j].
    """
    step = max(1, near // max(1, p.size(0) * p.size(1) * p.size(3)))
    for start in range(0, p.size(2), step):
        stop = start + step
        a = p[:, :, start:stop].mul_(factor[:, :, start:stop])
        if largest is not None:
            torch.maximum(largest, a.amax(-2), out=largest)
        if square is not None:
            square.add_(a.square_().sum(-2))


class Steps(NamedTuple):
    """All of them, in whichever interpreter."""

    tile_rows: Callable[..., Tensor]
    row_results: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]
    with_sink: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    spend_over_queries: Callable[..., None]


IN_PYTHON = Steps(tile_rows, row_results, with_sink, spend_over_queries)


_reading = threading.Lock()


@cache
def steps() -> Steps:
    """The steps in torch's own interpreter, or as they stand where torch has none."""
    # Cores ask at the same time, and two that silence a warning at once leave it silenced for the whole process.
    with _reading:
        return _in_torch()


@cache
def _in_torch() -> Steps:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return Steps(*(torch.jit.script(step) for step in IN_PYTHON))
        except (AttributeError, RuntimeError, OSError, NotImplementedError):
            return IN_PYTHON

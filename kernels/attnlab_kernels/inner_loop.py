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

from attnlab_kernels.tile_parts import (
    Hiding,
    Logits,
    Numbers,
    Spending,
    Sums,
    columns,
    logits_of_heads,
    of_rows,
    spending_of_heads,
    sums_of_heads,
)  # fmt: skip

NEAR_SCORES = 1 << 18
"""Scores that go through all steps at a time: 1 MB of float32 and as much of weights, which stay near a core."""

LEAST_ROWS = 16
"""Rows of a product with the keys, however many keys there are: fewer starve it."""


def tile_rows(of: Logits, sums: Sums, spending: Spending | None, numbers: Numbers, s: Tensor, p: Tensor) -> Tensor:
    """Take a tile through all steps, a few rows at a time, and return the extremes of `sums.top`, NaN if it holds one.

    Args:
        of, sums, spending, numbers: see there.
        s, p: buffers of `chunk_scores` entries.
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
                its, its_sums = logits_of_heads(of, at), sums_of_heads(sums, at)
                spends = None if spending is None else spending_of_heads(spending, at)
                k_t = its.k.flatten(0, 1).transpose(1, 2)
                for start in range(0, i, queries):
                    stop, width = min(i, start + queries), keys
                    if of.causal:
                        width = max(0, min(keys, max(of.first, stop + of.offset)))
                    t = _chunk_logits(its, k_t, start, stop, width, s)
                    weight, top, total = _chunk_weights(t, its, its_sums, numbers, start, stop, p)
                    if spends is not None:
                        _spend(weight, top, total, spends, start, stop, of, numbers)
    _over_largest(sums, numbers)
    return torch.stack([sums.top.amin(), sums.top.amax()])


def chunk_scores(of: Logits, numbers: Numbers) -> int:
    """How many entries a buffer needs."""
    keys = of.k.shape[2]
    return min(of.q.shape[:4].numel() * keys, max(numbers.near, numbers.least * keys))


def _hidden_span(of: Logits, hiding: Hiding, start: int, width: int) -> tuple[int, int]:
    """From where to where keys are hidden from some of the rows that begin at `start` and have `width` keys."""
    first = hiding.first
    if hiding.by_causality:
        first = max(first, start + of.offset + 1)
    return first, min(hiding.last, width)


def _hidden_part(hiding: Hiding, start: int, stop: int, first: int, last: int) -> Tensor:
    """What hides these keys from those queries."""
    return columns(of_rows(hiding.numbers, start, stop), first - hiding.first, last - hiding.first)


def _chunk_logits(of: Logits, k_t: Tensor, start: int, stop: int, width: int, s: Tensor) -> Tensor:
    """[b, n, g, i, width] logits of some queries, -inf where hidden, in the buffer `s`."""
    q = of_rows(of.q, start, stop)
    b, n, g, i = q.size(0), q.size(1), q.size(2), q.size(3)
    flat = s[: b * n * g * i * width].view(b * n, g * i, width)
    torch.bmm(q.reshape(b * n, g * i, q.size(4)), columns(k_t, 0, width), out=flat)
    t = flat.view(b, n, g, i, width)
    if of.cap != 0.0:
        t.tanh_().mul_(of.cap)
    for term in of.terms:
        t.add_(columns(of_rows(term, start, stop), 0, width), alpha=of.alpha)
    distances, slopes = of.distances, of.slopes
    if distances is not None and slopes is not None:
        t.addcmul_(columns(of_rows(distances, start, stop), 0, width), slopes)
    bias = of.sigmoid_bias
    if bias is not None:
        t.add_(bias)
    for hiding in of.hiding:
        first, last = _hidden_span(of, hiding, start, width)
        if first < last and (of.fill or not hiding.added):
            hidden = _hidden_part(hiding, start, stop, first, last)
            there = columns(t, first, last)
            if of.fill:
                there.masked_fill_(hidden == -math.inf, -math.inf)
            else:
                there.add_(hidden)
    return t


def _chunk_weights(
    t: Tensor, of: Logits, sums: Sums, numbers: Numbers, start: int, stop: int, p: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Write weights [b, n, g, i, width] and sum the rows; the logits `t` are spent.

    Returns:
        The weights; the largest logit of each row, None where the weights are sigmoids as they are; their sum.
    """
    width = t.size(-1)
    spare = p[: t.numel()].view(t.size())
    weight, kept, best, largest = spare, sums.weights, sums.best, sums.largest
    if kept is not None:
        rows = of_rows(kept, start, stop)
        rows.narrow(-1, width, rows.size(-1) - width).zero_()
        weight = rows.narrow(-1, 0, width)
    top, total = of_rows(sums.top, start, stop), of_rows(sums.total, start, stop)
    if largest is not None:
        sigmoids = _sigmoids(t, spare, sums, numbers, start, stop)
        if sigmoids is not None:
            return sigmoids, None, total
        of_rows(largest, start, stop).zero_()
    if width == 0:
        top.fill_(-math.inf)
        if best is not None:
            of_rows(best, start, stop).zero_()
    else:
        if of.sigmoid:
            log_sigmoid(t, spare)
        if best is None:
            torch.amax(t, [-1], True, out=top)
        else:
            value, place = torch.max(t, -1, True)
            top.copy_(value)
            of_rows(best, start, stop).copy_(place)
        t.sub_(top.clamp(min=numbers.lowest))
        if numbers.to_base_2 != 1.0:
            t.mul_(numbers.to_base_2)
        torch.exp2(t, out=weight)
    _without_tiny(weight, numbers)
    torch.sum(weight, [-1], True, out=total)
    product, norm = sums.product, sums.norm
    if product is not None:
        # Infinity times 0 is NaN, where hidden; a row that is NaN elsewhere has a total that says so.
        of_rows(product, start, stop).copy_(torch.nansum(t.mul_(weight), [-1], True))
    if norm is not None:
        of_rows(norm, start, stop).copy_(torch.linalg.vector_norm(weight, dim=[-1], keepdim=True))
    return weight, top, total


def _sigmoids(t: Tensor, spare: Tensor, sums: Sums, numbers: Numbers, start: int, stop: int) -> Tensor | None:
    """Sum rows whose weights are to be sigmoids as they are, and return these; the logits `t` and `spare` are spent.

    None, with the logits as they were, where all of some row are so small that their digits, or they, may be lost, or
    where one is NaN. What the sums lack `_over_largest` adds for all rows at a time; it knows these by `largest`.
    """
    kept, product, norm, largest = sums.weights, sums.product, sums.norm, sums.largest
    if largest is None or t.size(-1) == 0:
        return None
    most = torch.sigmoid(torch.amax(t, [-1], True, out=of_rows(sums.top, start, stop)))
    if not float(most.amin()) >= numbers.large_sigmoid:
        return None
    of_rows(largest, start, stop).copy_(most)
    weight, logarithm = t, spare
    if kept is None:
        t.sigmoid_()
    else:
        weight, logarithm = of_rows(kept, start, stop).narrow(-1, 0, t.size(-1)), t
        torch.sigmoid(t, out=weight)
    if product is not None:
        # Not of 0, whose logarithm takes forty times as long.
        torch.mul(weight, most.reciprocal(), out=logarithm).clamp_(min=numbers.tiny).log_().mul_(weight)
        torch.sum(logarithm, [-1], True, out=of_rows(product, start, stop))
    _without_tiny(weight, numbers)
    torch.sum(weight, [-1], True, out=of_rows(sums.total, start, stop))
    if norm is not None:
        of_rows(norm, start, stop).copy_(torch.linalg.vector_norm(weight, dim=[-1], keepdim=True))
    return weight


def _over_largest(sums: Sums, numbers: Numbers) -> None:
    """Make sums of sigmoids as they are those of their quotients to the largest, as the other rows' are.

    Their `top` is yet a logit and becomes the logarithm of its sigmoid; `largest` is 0 in the other rows and becomes 1.
    """
    largest, product, norm, total = sums.largest, sums.product, sums.norm, sums.total
    if largest is None:
        return
    plain = largest > 0
    largest.masked_fill_(~plain, 1.0)
    # A sigmoid may round in two ways, by its place in a tensor: one that is all its row has is to be its largest.
    alone = plain & (total <= largest * (1.0 + 2.0 * numbers.precision))
    largest.copy_(torch.where(alone, total, largest))
    total.div_(largest)
    top = sums.top.clone()
    log_sigmoid(top, torch.empty_like(top))
    sums.top.copy_(torch.where(plain, top, sums.top))
    if norm is not None:
        norm.div_(largest)
    if product is not None:
        own = product / largest
        # The largest counts nothing, but its quotient to itself may round.
        own.masked_fill_(own > -numbers.precision, 0.0).mul_(numbers.to_base_2)
        product.copy_(torch.where(plain, own, product))


def _without_tiny(weight: Tensor, numbers: Numbers) -> None:
    if not numbers.flushes:
        # Products of numbers too small to be normal take a hundred times as long, and as shares these are nothing.
        torch.threshold_(weight, numbers.tiny, 0.0)


def _spend(
    weight: Tensor, top: Tensor | None, total: Tensor, on: Spending, start: int, stop: int, of: Logits, numbers: Numbers
) -> None:
    """Read values by the weights of some queries and add them over these; weights are spent.

    They are the pattern's own entries where they have no `top`.
    """
    b, n, g, i, width = weight.size(0), weight.size(1), weight.size(2), weight.size(3), weight.size(4)
    sink, padding, v = on.sink, on.padding, on.v.flatten(0, 1)
    if top is None:
        factor = torch.ones_like(total)
    elif of.sigmoid:
        factor = torch.exp(top * numbers.unit)
    else:
        # A row's largest weight is 1, so that only a row that sees no key has less.
        whole = total.clamp(min=1.0)
        if sink is not None:
            whole = whole + torch.exp(sink - top.clamp(min=numbers.lowest) * numbers.unit)
        factor = whole.reciprocal()
    read = torch.bmm(weight.view(b * n, g * i, width), v.narrow(1, 0, width)).view(b, n, g, i, v.size(-1))
    of_rows(on.out, start, stop).copy_(read.mul_(factor))
    if padding is not None:
        unread = of_rows(padding, start, stop)
        if bool((factor.isnan() & unread).any()):
            # 0 times NaN is NaN, and whatever padding holds must not reach a statistic.
            weight.masked_fill_(unread, 0.0)
        factor = factor.masked_fill(unread, 0.0)
    key_sum, key_square, key_max = on.key_sum, on.key_square, on.key_max
    if key_sum is not None:
        here = torch.bmm(factor.reshape(b * n * g, 1, i), weight.view(b * n * g, i, width))
        columns(key_sum, 0, width).add_(here.view(b, n, g, width))
    if key_square is not None or key_max is not None:
        if top is not None or padding is not None:
            weight.mul_(factor)
        square = None if key_square is None else columns(key_square, 0, width)
        _add_squares(weight, square, None if key_max is None else columns(key_max, 0, width))


def row_results(
    top: Tensor,
    total: Tensor,
    product: Tensor | None,
    unit: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Of sums from `tile_rows`: the largest logit, lse, 1 / total, and the entropy; for rows that see a key."""
    top = top * unit
    log_total = torch.log(total)
    entropy: Tensor | None = None
    if product is not None:
        entropy = torch.addcdiv(log_total, product, total, value=-math.log(2))
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
    spare.mul_(-1 / math.log(2)).exp2_().log1p_()
    x.clamp_(max=0.0).sub_(spare)


def _add_squares(a: Tensor, square: Tensor | None, largest: Tensor | None) -> None:
    """Add the squares of a [..., i, j] over queries to `square`, and take its maxima into `largest`; a is spent."""
    if largest is not None:
        torch.maximum(largest, a.amax(-2), out=largest)
    if square is not None:
        square.add_(a.square_().sum(-2))


def spend_over_queries(p: Tensor, factor: Tensor, square: Tensor | None, largest: Tensor | None, near: int) -> None:
    """Add the squares of A = p * factor over queries to `square`, and take its maxima into `largest`; p is spent.

    Args:
        p: [b, h, i, j]; factor: [b, h, i, 1]; square, largest: [b, h, j].
    """
    step = max(1, near // max(1, p.size(0) * p.size(1) * p.size(3)))
    for start in range(0, p.size(2), step):
        stop = start + step
        _add_squares(p[:, :, start:stop].mul_(factor[:, :, start:stop]), square, largest)


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
        return _read_once()


@cache
def _read_once() -> Steps:
    with warnings.catch_warnings():
        # Which of both it warns with depends on torch's version.
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        try:
            return Steps(*(torch.jit.script(step) for step in IN_PYTHON))
        except (AttributeError, RuntimeError, OSError, NotImplementedError):
            return IN_PYTHON

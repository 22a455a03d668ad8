"""What the inner loop of backend `tiled` reads and writes for a tile, and how it is cut to heads, rows and keys.

TorchScript reads these classes, so their annotations are no strings.
"""

from typing import NamedTuple

from torch import Tensor


class Hiding(NamedTuple):
    """Keys from `first` to `last` that are hidden from some row.

    Attributes:
        numbers: shaped as terms with those keys alone, 0 or -inf.
        added: whether they are among the terms.
        by_causality: whether row i sees all keys up to i + offset.
    """

    first: int
    last: int
    numbers: Tensor
    added: bool
    by_causality: bool


class Logits(NamedTuple):
    """What a tile's logits are made of, in units of `unit`. Heads are split into n key heads and g heads of each.

    Attributes:
        q: [b, n, g, i, d], times the scale. k: [b, n, j, d].
        cap: the soft cap, 0 for none.
        terms: [b or 1, n or 1, g or 1, i or 1, j or 1], added after the cap, times `alpha`.
        distances: shaped alike, added times `slopes` [1, n, g, 1, 1].
        sigmoid: whether logits are to be ln sigmoid, in units of 1. sigmoid_bias: [1, n, g, 1, 1], added before that.
        hiding: what hides keys from some row.
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
    hiding: list[Hiding]
    fill: bool
    causal: bool
    offset: int
    first: int


class Sums(NamedTuple):
    """Takes what each row sums to, [b, n, g, i, 1], and the weights where they are kept.

    Attributes:
        top, total, product: the largest logit, the sum of e^t and that of t e^t, with t = logit - largest logit, in the
            logits' units times `to_base_2`.
        largest: for sigmoids alone: takes the largest weight of each row. Where no row of those that go together has
            small ones only, weights are sigmoids as they are; elsewhere they are e^t, and it is 1.
        best: the place of the largest. norm: the square root of the sum of e^2t.
        weights: [b, n, g, i, j], e^t, 0 where hidden.
    """

    top: Tensor
    total: Tensor
    product: Tensor | None
    largest: Tensor | None
    best: Tensor | None
    norm: Tensor | None
    weights: Tensor | None


class Spending(NamedTuple):
    """What the weights are for, where they are not kept. A = e^t times a factor of its row.

    Attributes:
        v: [b, n, j, dv]. out: [b, n, g, i, dv], takes A V.
        sink: [1, n, g, 1, 1], a learned sink's logit.
        padding: [b, 1, 1, i, 1], True for queries that do not count.
        key_sum, key_square, key_max: [b, n, g, j], zeros, take the sums of A and of A^2 and the largest A over queries.
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
        tiny: the least normal number; weights below it are written as 0, unless the processor `flushes` them itself.
        precision: the distance from 1 to the next number.
        large_sigmoid: sigmoids are summed as they are where all rows that go together have one from it on; the digits
            of smaller ones are in their logarithms.
        near: how many scores to take at a time, and `least` how many rows of a head at least.
    """

    unit: float
    to_base_2: float
    lowest: float
    tiny: float
    flushes: bool
    precision: float
    large_sigmoid: float
    near: int
    least: int


def of_heads(x: Tensor, at: list[int]) -> Tensor:
    """Some batch rows, key heads and heads of each, of [b or 1, n or 1, g or 1, ...]."""
    for dim in range(min(3, x.dim())):
        length = at[2 * dim + 1] - at[2 * dim]
        if x.size(dim) > length:
            x = x.narrow(dim, at[2 * dim], length)
    return x


def _if_any(x: Tensor | None, at: list[int]) -> Tensor | None:
    return None if x is None else of_heads(x, at)


def _of_key_heads(x: Tensor, at: list[int]) -> Tensor:
    """The same of [b, n, ...]."""
    return x.narrow(0, at[0], at[1] - at[0]).narrow(1, at[2], at[3] - at[2])


def logits_of_heads(of: Logits, at: list[int]) -> Logits:
    """The same of all that logits are made of."""
    return Logits(
        of_heads(of.q, at), _of_key_heads(of.k, at), of.cap, [of_heads(x, at) for x in of.terms], of.alpha,
        _if_any(of.distances, at), _if_any(of.slopes, at), of.sigmoid, _if_any(of.sigmoid_bias, at),
        [Hiding(x.first, x.last, of_heads(x.numbers, at), x.added, x.by_causality) for x in of.hiding], of.fill,
        of.causal, of.offset, of.first,
    )  # fmt: skip


def sums_of_heads(sums: Sums, at: list[int]) -> Sums:
    """The same of all that rows sum to."""
    return Sums(
        of_heads(sums.top, at), of_heads(sums.total, at), _if_any(sums.product, at),
        _if_any(sums.largest, at), _if_any(sums.best, at), _if_any(sums.norm, at), _if_any(sums.weights, at),
    )  # fmt: skip


def spending_of_heads(of: Spending, at: list[int]) -> Spending:
    """The same of all that weights are for."""
    return Spending(
        _of_key_heads(of.v, at), of_heads(of.out, at), _if_any(of.sink, at), _if_any(of.padding, at),
        _if_any(of.key_sum, at), _if_any(of.key_square, at), _if_any(of.key_max, at),
    )  # fmt: skip


def of_rows(x: Tensor, start: int, stop: int) -> Tensor:
    """Some queries of [b, n, g, i or 1, ...]."""
    return x.narrow(3, start, stop - start) if x.size(3) > stop - start else x


def columns(x: Tensor, start: int, stop: int) -> Tensor:
    """Some keys of [..., j or 1]."""
    return x.narrow(-1, start, stop - start) if x.size(-1) > stop - start else x

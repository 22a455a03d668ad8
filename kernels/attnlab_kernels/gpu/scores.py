"""One tile of the pattern: products, logits, what is visible, weights. Every kernel reads the pattern through here.

`o_m` and `o_n` are numbers of queries and keys that broadcast to the tile: [M, 1] and [1, N], or the other way about
where keys stand in rows. Exponents are fma(s, c, -m c) with c = scale log2(e): s c is never rounded by itself, and the
rounding of m c, the same for a whole row, cancels.
"""

# triton's own decorators and scalars carry no types
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def head_of(t, i_b, i_h):
    """Where one head of one batch row of a `Strided` begins."""
    return t.p + i_b.to(tl.int64) * t.b + i_h.to(tl.int64) * t.h


@triton.jit
def _starts(start, o, stride):
    """Where rows begin, in elements. Unsigned 32-bit factors make it one wide multiplication, redone in every tile:

    offsets that are the same in all tiles would be kept in registers, which the tiles themselves need.
    """
    return (start + o).to(tl.uint32).to(tl.uint64) * tl.cast(tl.cast(stride, tl.uint32), tl.uint64)


@triton.jit
def load_rows(p, t, start, size, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr):
    """[BLOCK, BLOCK_D] rows from `start` on, 0 outside; without `EDGE` all of them lie below `size`."""
    o = tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_D)
    at = p + (_starts(start, o, t.n)[:, None] + o_d[None, :] * t.d)
    if EDGE:
        m = (start + o[:, None] < size) & (o_d[None, :] < D)
        return tl.load(at, mask=m, other=0.0)
    if D != BLOCK_D:
        return tl.load(at, mask=o_d[None, :] < D, other=0.0)
    return tl.load(at)


@triton.jit
def load_columns(p, t, start, size, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr):
    """The same rows as columns: [BLOCK_D, BLOCK]."""
    o = tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_D)
    at = p + (_starts(start, o, t.n)[None, :] + o_d[:, None] * t.d)
    if EDGE:
        m = (start + o[None, :] < size) & (o_d[:, None] < D)
        return tl.load(at, mask=m, other=0.0)
    if D != BLOCK_D:
        return tl.load(at, mask=o_d[:, None] < D, other=0.0)
    return tl.load(at)


@triton.jit
def visible(x, i_b, i_h, o_m, o_n):
    """Whether each entry of a tile exists and is visible; biases of -inf apart."""
    inside = (o_m < x.queries) & (o_n < x.keys)
    seen = inside
    distance = o_m + x.offset - o_n
    if x.window is not None:
        near = (distance < x.window) & (distance > -x.window)
        if x.first_tokens is not None:
            near = near | (o_n < x.first_tokens)
        seen = seen & near
    if x.causal:
        seen = seen & (distance >= 0)
    if x.prefix is not None:
        seen = seen | (inside & (o_n < tl.load(x.prefix + i_b)))
    if x.query_segments is not None:
        b_i = tl.load(x.query_segments + i_b.to(tl.int64) * x.queries + o_m, mask=o_m < x.queries, other=0)
        b_j = tl.load(x.key_segments + i_b.to(tl.int64) * x.keys + o_n, mask=o_n < x.keys, other=0)
        seen = seen & (b_i == b_j)
    if x.key_mask is not None:
        seen = seen & (tl.load(x.key_mask + i_b.to(tl.int64) * x.keys + o_n, mask=o_n < x.keys, other=0) != 0)
    if x.mask is not None:
        at = head_of(x.mask, i_b, i_h) + o_m.to(tl.int64) * x.mask.n + o_n.to(tl.int64) * x.mask.d
        seen = seen & (tl.load(at, mask=inside, other=0) != 0)
    return seen


@triton.jit
def tanh(x):
    """Hyperbolic tangent to a few units in the last place: a polynomial near 0, where the quotient would cancel."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = tl.where(x < 0, -1.0, 1.0) * ((1.0 - e) / (1.0 + e))
    y = x * x
    near = -1382.0 / 155925.0
    near = tl.fma(y, near, 62.0 / 2835.0)
    near = tl.fma(y, near, -17.0 / 315.0)
    near = tl.fma(y, near, 2.0 / 15.0)
    near = tl.fma(y, near, -1.0 / 3.0)
    return tl.where(tl.abs(x) < 0.3, tl.fma(x * y, near, x), far)


@triton.jit
def log1p(x):
    """ln(1 + x) for x >= 0, by its series near 0, where 1 + x would lose x."""
    near = tl.fma(x, tl.fma(x, tl.fma(x, tl.fma(x, 0.2, -0.25), 1.0 / 3.0), -0.5), 1.0)
    return tl.where(x < 0.01, x * near, tl.log(1.0 + x))


@triton.jit
def logits(b_s, x, i_b, i_h, o_m, o_n, MASKED: tl.constexpr):
    """Products q . k of a tile as logits `s`, and the derivatives that softcap and the sigmoid normaliser give them.

    Returns `s` (-inf where hidden, which tiles without `MASKED` hold only by a bias), d s / d bias and
    d s / d (scale q . k); the last two are 1 where nothing bends.
    """
    d_bias = 1.0
    d_score = 1.0
    if not x.raw:
        b_s = b_s * x.scale
        if x.softcap is not None:
            b_t = tanh(b_s / x.softcap)
            b_s = x.softcap * b_t
            d_score = 1.0 - b_t * b_t
        if x.bias is not None:
            at = head_of(x.bias, i_b, i_h) + o_m.to(tl.int64) * x.bias.n + o_n.to(tl.int64) * x.bias.d
            b_bias = tl.load(at, mask=(o_m < x.queries) & (o_n < x.keys), other=0.0).to(tl.float32)
            # Many hide by the most negative number, which as a power of two would be -inf: rows of nothing else too.
            b_s += tl.where((b_bias < -1e38) & (b_bias != -float("inf")), -1e38, b_bias)
        distance = o_n - o_m - x.offset
        if x.alibi is not None:
            b_s -= tl.load(x.alibi + i_h) * tl.abs(distance).to(tl.float32)
        if x.relative is not None:
            place = tl.minimum(tl.maximum(distance, -x.relative.reach), x.relative.reach) + x.relative.reach
            b_s += tl.load(x.relative.biases + i_h * (2 * x.relative.reach + 1) + place)
        if x.sigmoid:
            if x.sigmoid_bias is not None:
                b_s += tl.load(x.sigmoid_bias + i_h)
            b_e = tl.exp(-tl.abs(b_s))
            d_bias = tl.where(b_s > 0, b_e, 1.0) / (1.0 + b_e)
            d_score = d_score * d_bias
            b_s = tl.minimum(b_s, 0.0) - log1p(b_e)
    if MASKED:
        b_s = tl.where(visible(x, i_b, i_h, o_m, o_n), b_s, -float("inf"))
    return b_s, d_bias, d_score


@triton.jit
def weights(b_s, x, pivot, log_z):
    """The pattern A of a tile from its logits and what the forward kept of each row, broadcast to the tile.

    `pivot` and ln Z stay apart: their rounded sum would cost three digits at logits of 1e5. Under the sigmoid
    normaliser A does not depend on the row. Rows that do not count carry a pivot of +inf.
    """
    if x.sigmoid:
        return tl.where(pivot == float("inf"), 0.0, tl.exp2(b_s * x.c))
    return shares(b_s, x, pivot, log_z)


@triton.jit
def shares(b_s, x, pivot, log_z):
    """A divided by its row sum, a learned sink counted in the sum; under softmax the same as A."""
    return tl.exp2(log_shares(b_s, x, pivot, log_z))


@triton.jit
def log_shares(b_s, x, pivot, log_z):
    """The logarithms of `shares`, in powers of two."""
    return tl.fma(b_s, x.c, -pivot) - log_z

"""The second pass: what sums over queries, with the rows' normalisers known from the forward.

A program holds a tile of keys and walks over the queries that see it. Keys stand in the rows of a tile, so a sum over
queries stays within a few threads. With e = 2^(s c - pivot) and 1/Z from the forward, a tile is exactly normalised,
and a sum over queries of e / Z takes one multiply-add a score. Nothing is added to memory that another program writes,
so two runs give the same bytes.

With few tiles of keys the queries are spread over several programs, whose sums are added afterwards.
"""

# triton's own decorators and scalars carry no types
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnlab_kernels.gpu.pools import add_to_pool, count_in_pool
from attnlab_kernels.gpu.profiles import add_to_profile, no_profile, store_profile
from attnlab_kernels.gpu.scores import head_of, load_rows, logits
from attnlab_kernels.gpu.tiles import plan_queries, query_tile


class Factors(NamedTuple):
    """What turns logits into the pattern, [B, Hq, Nq] in float32: A = 2^(s c + shift) factor.

    Attributes:
        shift: minus the pivot; -inf for queries that do not count.
        factor: 1/Z, or 1 under the sigmoid normaliser; 0 for queries that do not count.
        later: the factors of queries behind the boundary of a block within their part of a tile, which are 0 in
            `factor` then; None without a pooled map that needs it.
    """

    shift: Any
    factor: Any
    later: Any


class Wanted(NamedTuple):
    """Where a pass writes; None compiles out.

    Attributes:
        key_sum, key_square, key_max, key_count: [parts, B * Hq, Nk], the count in int32.
        probes: [parts, B * Hq, Nk, columns].
        pool, profile: see `Pool` and `Profile`.
        bin_counts: numbers of entries in the profile's bins, shaped like its sums, in int32; None where not counted.
        precision: constexpr, how products with probes are taken; last for the reason that `Above` gives.
    """

    key_sum: Any
    key_square: Any
    key_max: Any
    key_count: Any
    probes: Any
    pool: Any
    profile: Any
    bin_counts: Any
    precision: Any


@triton.jit
def load_queries(p, x, i_b, start, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr):
    """[BLOCK_D, BLOCK_M], 0 for queries that do not count: whatever padding holds must not reach a sum."""
    o_m = start + tl.arange(0, BLOCK_M)[None, :]
    o_d = tl.arange(0, BLOCK_D)[:, None]
    at = p + tl.cast(start, tl.int64) * x.q.n + (tl.arange(0, BLOCK_M)[None, :] * x.q.n + o_d * x.q.d)
    if x.query_mask is not None:
        counts = tl.load(x.query_mask + i_b * x.queries + o_m, mask=o_m < x.queries, other=0) != 0
        return tl.load(at, mask=counts & (o_d < x.d), other=0.0)
    if EDGE:
        return tl.load(at, mask=(o_m < x.queries) & (o_d < x.d), other=0.0)
    if x.d != BLOCK_D:
        return tl.load(at, mask=o_d < x.d, other=0.0)
    return tl.load(at)


@triton.jit
def load_factor(p, i_bh, start, queries, BLOCK_M: tl.constexpr, OTHER: tl.constexpr, EDGE: tl.constexpr):
    """One factor of a tile's queries; `OTHER` beyond the last one."""
    o = tl.arange(0, BLOCK_M)
    # The tile's address first: places within it are constants then.
    at = p + (i_bh * queries + start) + o
    if EDGE:
        return tl.load(at, mask=start + o < queries, other=OTHER)
    return tl.load(at)


@triton.jit
def scores(b_k, b_q, x, i_b, i_h, o_m, o_n, MASKED: tl.constexpr):
    """Logits of a tile [keys, queries], -inf where hidden."""
    b_s = tl.dot(b_k, b_q, input_precision="ieee")
    b_s, _, _ = logits(b_s, x, i_b, i_h, o_m[None, :], o_n[:, None], MASKED)
    return b_s


@triton.jit
def exponentials(b_s, shift, x):
    """e = 2^(s c + shift) of a tile [keys, queries]."""
    if x.sigmoid:
        b_e = tl.exp2(b_s * x.c)
    else:
        b_e = tl.exp2(tl.fma(b_s, x.c, shift[None, :]))
    if x.bias is not None and x.query_mask is not None:
        # A bias may hold anything in the rows of padding.
        b_e = tl.where((shift == -float("inf"))[None, :], 0.0, b_e)
    return b_e


@triton.jit
def _visit(
    sums, squares, largest, seen, acc, waiting, b_k, x, factors, wanted, keys_later, p_q, p_w, i_bh, i_b, i_h, i_m, i_n,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Add one tile of queries to a tile of keys."""
    start = i_m * BLOCK_M
    o_m = start + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_q = load_queries(p_q, x, i_b, start, BLOCK_M, BLOCK_D, MASKED)
    shift = load_factor(factors.shift, i_bh, start, x.queries, BLOCK_M, -float("inf"), MASKED)
    factor = load_factor(factors.factor, i_bh, start, x.queries, BLOCK_M, 0.0, MASKED)
    later = factor
    if factors.later is not None:
        later = load_factor(factors.later, i_bh, start, x.queries, BLOCK_M, 0.0, MASKED)
    b_s = scores(b_k, b_q, x, i_b, i_h, o_m, o_n, MASKED)
    # Only where entries may be hidden are they looked at one by one. Counts come first, while the logits are at hand.
    GUARDED: tl.constexpr = MASKED or x.bias is not None
    b_seen = b_s != -float("inf")
    counted = shift > -float("inf")
    here_seen = tl.full([BLOCK_N], BLOCK_M, tl.int32)
    if GUARDED:
        if x.query_mask is not None:
            here_seen = tl.sum((b_seen & counted[None, :]).to(tl.int32), 1)
        else:
            here_seen = tl.sum(b_seen.to(tl.int32), 1)
    elif x.query_mask is not None:
        here_seen = tl.zeros([BLOCK_N], tl.int32) + tl.sum(counted.to(tl.int32))
    if wanted.pool is not None:
        count_in_pool(b_seen, factor, wanted.pool, x, i_bh, i_m, i_n, keys_later, 0, GUARDED, BLOCK_M, BLOCK_N)
        if factors.later is not None:
            count_in_pool(b_seen, later, wanted.pool, x, i_bh, i_m, i_n, keys_later, 1, GUARDED, BLOCK_M, BLOCK_N)
    b_e = exponentials(b_s, shift, x)
    if wanted.pool is not None:
        here = add_to_pool(b_e, factor, wanted.pool, i_bh, i_m, i_n, keys_later, 0, BLOCK_M, BLOCK_N)
        if factors.later is not None:
            here += add_to_pool(b_e, later, wanted.pool, i_bh, i_m, i_n, keys_later, 1, BLOCK_M, BLOCK_N)
            factor += later
    else:
        here = tl.sum(b_e * factor[None, :], 1)
    b_a = b_e * factor[None, :]
    if wanted.key_sum is not None:
        sums += here
    if wanted.key_square is not None:
        squares += tl.sum(b_a * b_a, 1)
    if wanted.key_max is not None:
        largest = tl.maximum(largest, tl.max(b_a, 1))
    if wanted.key_count is not None:
        seen += here_seen
    if wanted.probes is not None:
        b_w = load_rows(p_w, x.f, start, x.queries, x.g, BLOCK_M, BLOCK_G, MASKED)
        acc += tl.dot(b_a, b_w, input_precision=wanted.precision)
    if wanted.profile is not None:
        waiting = add_to_profile(
            waiting, b_e, factor, b_seen, counted, here, here_seen, wanted.profile, x, o_m, o_n, start, i_n * BLOCK_N,
            wanted.bin_counts is not None, GUARDED, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    return sums, squares, largest, seen, acc, waiting


@triton.jit
def statistics_kernel(
    x, schedule, factors, wanted, parts,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """One program: a tile of keys of one head, and one part of its queries. Grid (B * Hq, tiles, parts).

    Query probes stand in `x.f` [B, Hq, Nq, columns].
    """
    i_bh = tl.program_id(0).to(tl.int64)
    i_b = i_bh // x.heads
    i_h = i_bh % x.heads
    i_n = tl.program_id(1)
    part = tl.program_id(2)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_k = load_rows(head_of(x.k, i_b, i_h // x.group), x.k, i_n * BLOCK_N, x.keys, x.d, BLOCK_N, BLOCK_D, True)
    p_q = head_of(x.q, i_b, i_h)
    p_w = p_q
    if wanted.probes is not None:
        p_w = head_of(x.f, i_b, i_h)
    keys_later = o_n < 0
    if factors.later is not None:
        PART: tl.constexpr = wanted.pool.part_n
        keys_later = o_n // wanted.pool.size > o_n // PART * PART // wanted.pool.size
    sums = tl.zeros([BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_N], tl.float32)
    largest = tl.zeros([BLOCK_N], tl.float32)
    seen = tl.zeros([BLOCK_N], tl.int32)
    acc = tl.zeros([BLOCK_N, BLOCK_G], tl.float32)
    waiting = no_profile(BLOCK_N, BINS)

    full, every, low, clear_low = plan_queries(x, schedule, i_b, i_h, i_n, BLOCK_M, BLOCK_N)
    for t in range(full * part // parts, full * (part + 1) // parts):
        i_m = query_tile(t, schedule, i_b, i_h, i_n, full, low, clear_low, True)
        sums, squares, largest, seen, acc, waiting = _visit(
            sums, squares, largest, seen, acc, waiting, b_k, x, factors, wanted, keys_later, p_q, p_w, i_bh, i_b, i_h,
            i_m, i_n, False, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_G,
        )  # fmt: skip
    mixed = every - full
    for t in range(full + mixed * part // parts, full + mixed * (part + 1) // parts):
        i_m = query_tile(t, schedule, i_b, i_h, i_n, full, low, clear_low, False)
        sums, squares, largest, seen, acc, waiting = _visit(
            sums, squares, largest, seen, acc, waiting, b_k, x, factors, wanted, keys_later, p_q, p_w, i_bh, i_b, i_h,
            i_m, i_n, True, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_G,
        )  # fmt: skip

    row = part * tl.num_programs(0).to(tl.int64) + i_bh
    in_keys = o_n < x.keys
    at = row * x.keys + o_n
    if wanted.key_sum is not None:
        tl.store(wanted.key_sum + at, sums, mask=in_keys)
    if wanted.key_square is not None:
        tl.store(wanted.key_square + at, squares, mask=in_keys)
    if wanted.key_max is not None:
        tl.store(wanted.key_max + at, largest, mask=in_keys)
    if wanted.key_count is not None:
        tl.store(wanted.key_count + at, seen, mask=in_keys)
    if wanted.probes is not None:
        o_g = tl.arange(0, BLOCK_G)
        at_g = wanted.probes + at[:, None] * x.g + o_g[None, :]
        tl.store(at_g, acc, mask=in_keys[:, None] & (o_g[None, :] < x.g))
    if wanted.profile is not None:
        store_profile(waiting, wanted.profile, wanted.bin_counts, row * tl.num_programs(1) + i_n)

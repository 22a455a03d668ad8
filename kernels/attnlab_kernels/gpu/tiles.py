"""Which tiles a program visits: empty ones never, and those without hidden entries in a loop of their own.

A plan numbers the tiles of one program, first `full` that hide nothing, then the rest up to `all`. Causality, window
and first tokens give it by arithmetic; prefixes, documents, padding and boolean masks by a `Schedule` made beforehand.
"""

# triton's own decorators and scalars carry no types
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def plan_keys(x, schedule, i_b, i_h, i_m, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The plan of tile `i_m` of queries over tiles of keys: what `key_tile` needs, `full` and `all` first."""
    if schedule is not None:
        row = (i_b * schedule.heads + i_h % schedule.heads).to(tl.int64) * schedule.rows + i_m
        full = tl.load(schedule.full + row)
        every = tl.load(schedule.all + row)
        return full, every, 0, 0, 0, 0, 0
    first = i_m * BLOCK_M + x.offset
    last = tl.minimum(i_m * BLOCK_M + BLOCK_M, x.queries) - 1 + x.offset
    stop = x.keys
    clear_stop = x.keys
    if x.window is not None:
        stop = tl.minimum(stop, last + x.window)
        clear_stop = tl.minimum(clear_stop, first + x.window)
    if x.causal:
        stop = tl.minimum(stop, last + 1)
        clear_stop = tl.minimum(clear_stop, first + 1)
    right = tl.cdiv(tl.maximum(stop, 0), BLOCK_N)
    left = 0
    clear_left = 0
    head_full = 0
    head = 0
    if x.window is not None:
        start = tl.maximum(first - x.window + 1, 0)
        left = tl.where(start < stop, start // BLOCK_N, right)
        clear_left = tl.cdiv(tl.maximum(last - x.window + 1, 0), BLOCK_N)
        if x.first_tokens is not None:
            head_stop = tl.minimum(x.first_tokens, x.keys)
            head_clear = head_stop
            if x.causal:
                head_stop = tl.minimum(head_stop, last + 1)
                head_clear = tl.minimum(head_clear, first + 1)
            head = tl.cdiv(tl.maximum(head_stop, 0), BLOCK_N)
            head_full = tl.maximum(head_clear, 0) // BLOCK_N
            left = tl.maximum(left, head)
            right = tl.maximum(right, left)
    clear_left = tl.minimum(tl.maximum(clear_left, left), right)
    clear_right = tl.minimum(tl.maximum(tl.maximum(clear_stop, 0) // BLOCK_N, clear_left), right)
    full = head_full + clear_right - clear_left
    every = head + right - left
    return full, every, head_full, head, left, clear_left, clear_right


@triton.jit
def key_tile(t, schedule, i_b, i_h, i_m, full, head_full, head, left, clear_left, clear_right, FULL: tl.constexpr):
    """The tile of keys that stands at place `t` of a plan; `FULL` says on which side of `full` that is."""
    if schedule is not None:
        row = (i_b * schedule.heads + i_h % schedule.heads).to(tl.int64) * schedule.rows + i_m
        return tl.load(schedule.tiles + row * schedule.columns + t)
    if FULL:
        return tl.where(t < head_full, t, clear_left + t - head_full)
    u = t - full
    edge = head - head_full
    before = edge + clear_left - left
    return tl.where(u < edge, head_full + u, tl.where(u < before, left + u - edge, clear_right + u - before))


@triton.jit
def plan_queries(x, schedule, i_b, i_h, i_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The plan of tile `i_n` of keys over tiles of queries: what `query_tile` needs, `full` and `all` first.

    A tile with keys or queries beyond the last one is not full, so that sums over a full tile need no mask.
    """
    if schedule is not None:
        row = (i_b * schedule.heads + i_h % schedule.heads).to(tl.int64) * schedule.rows + i_n
        full = tl.load(schedule.full + row)
        every = tl.load(schedule.all + row)
        return full, every, 0, 0
    near = i_n * BLOCK_N - x.offset
    far = tl.minimum(i_n * BLOCK_N + BLOCK_N, x.keys) - 1 - x.offset
    start = 0
    clear_start = 0
    stop = x.queries
    clear_stop = x.queries
    if x.window is not None:
        start = tl.maximum(start, near - x.window + 1)
        clear_start = tl.maximum(clear_start, far - x.window + 1)
        stop = tl.minimum(stop, far + x.window)
        clear_stop = tl.minimum(clear_stop, near + x.window)
        if x.first_tokens is not None:
            if i_n * BLOCK_N < x.first_tokens:
                start = 0
                stop = x.queries
            if i_n * BLOCK_N + BLOCK_N <= x.first_tokens:
                clear_start = 0
                clear_stop = x.queries
    if x.causal:
        start = tl.maximum(start, near)
        clear_start = tl.maximum(clear_start, far)
    if i_n * BLOCK_N + BLOCK_N > x.keys:
        clear_stop = 0
    start = tl.maximum(start, 0)
    low = start // BLOCK_M
    high = tl.where(start < stop, tl.cdiv(stop, BLOCK_M), low)
    clear_low = tl.minimum(tl.maximum(tl.cdiv(clear_start, BLOCK_M), low), high)
    clear_high = tl.minimum(tl.maximum(tl.maximum(clear_stop, 0) // BLOCK_M, clear_low), high)
    return clear_high - clear_low, high - low, low, clear_low


@triton.jit
def query_tile(t, schedule, i_b, i_h, i_n, full, low, clear_low, FULL: tl.constexpr):
    """The tile of queries that stands at place `t` of a plan; `FULL` says on which side of `full` that is."""
    if schedule is not None:
        row = (i_b * schedule.heads + i_h % schedule.heads).to(tl.int64) * schedule.rows + i_n
        return tl.load(schedule.tiles + row * schedule.columns + t)
    if FULL:
        return clear_low + t
    u = t - full
    return tl.where(u < clear_low - low, low + u, low + full + u)

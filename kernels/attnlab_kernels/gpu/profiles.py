"""Sums over bins of the distance i + offset - j, for a few bins: the kernel's part.

A tile far from the diagonal touches one bin, and then its sums over queries are added to what waits for that bin, which
takes nothing more a score. Otherwise the entries of each bin that it touches are summed on their own.
"""

# triton's own decorators and scalars carry no types
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from attnlab_kernels.problem import Problem

MOST_BINS = 64
"""Most bins that a program holds in registers, the two outside the edges included."""


class Profile(NamedTuple):
    """Sums over bins, one row a program.

    Attributes:
        sums: [parts, B * Hq, tiles of keys, bins].
        edges: [bins + 1] int32. The first and the last bin hold what lies outside the edges asked for.
        bin_of: [Nq + Nk - 1] int32, the bin of each distance from `origin` on.
        bins: bins with memory, a power of two; constexpr.
    """

    sums: Any
    edges: Any
    bin_of: Any
    origin: Any
    bins: Any


class Waiting(NamedTuple):
    """What a program holds of a profile: sums and counts of the bin at hand [keys], and of all bins [bins].

    Distances of the bin at hand run from `low` to below `high`.
    """

    here: Any
    here_count: Any
    sums: Any
    counts: Any
    bin: Any
    low: Any
    high: Any


@triton.jit
def no_profile(BLOCK_N: tl.constexpr, BINS: tl.constexpr):
    """Nothing waits: no distance lies in the bin at hand."""
    return Waiting(
        tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.int32), tl.zeros([BINS], tl.float32),
        tl.zeros([BINS], tl.int32), tl.cast(0, tl.int32), tl.cast(0, tl.int32), tl.cast(0, tl.int32),
    )  # fmt: skip


@triton.jit
def put_away(w, BINS: tl.constexpr):
    """What waits for the bin at hand, added to it: sums and counts of all bins."""
    at = tl.arange(0, BINS) == w.bin
    return w.sums + tl.where(at, tl.sum(w.here), 0.0), w.counts + tl.where(at, tl.sum(w.here_count), 0)


@triton.jit
def add_to_profile(
    w, b_e, factor, b_seen, counted, sums, counts, profile, x, o_m, o_n, start_m, start_n,
    COUNT: tl.constexpr, GUARDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add one tile of `b_e * factor` [keys, queries]; `sums` and `counts` are its sums over all queries."""
    nearest = tl.maximum(start_m + x.offset - (start_n + BLOCK_N - 1), profile.origin)
    farthest = tl.minimum(start_m + BLOCK_M - 1, x.queries - 1) + x.offset - start_n
    here, here_count, all_sums, all_counts, at_bin, low, high = w
    if (nearest >= low) & (farthest < high):
        here += sums
        here_count += counts
    else:
        first = tl.load(profile.bin_of + (nearest - profile.origin))
        last = tl.load(profile.bin_of + (farthest - profile.origin))
        for i_bin in range(first, last + 1):
            all_sums, all_counts = put_away(
                Waiting(here, here_count, all_sums, all_counts, at_bin, low, high), profile.bins
            )
            at_bin = i_bin
            low = tl.load(profile.edges + i_bin)
            high = tl.load(profile.edges + i_bin + 1)
            # The edges move to each key's side, so that one comparison a score is all that the bounds take.
            within_from = low + (o_n - x.offset)
            within_to = high + (o_n - x.offset)
            b_within = (o_m[None, :] >= within_from[:, None]) & (o_m[None, :] < within_to[:, None])
            here = tl.sum(tl.where(b_within, b_e, 0.0) * factor[None, :], 1)
            if COUNT:
                b_counted = b_within
                if x.query_mask is not None:
                    b_counted = b_counted & counted[None, :]
                if GUARDED:
                    b_counted = b_counted & b_seen
                here_count = tl.sum(b_counted.to(tl.int32), 1)
    return Waiting(here, here_count, all_sums, all_counts, at_bin, low, high)


@triton.jit
def store_profile(w, profile, p_counts, row):
    """Write what a program found, at its row of the partial sums; counts where there is memory for them."""
    sums, counts = put_away(w, profile.bins)
    at = row * profile.bins + tl.arange(0, profile.bins)
    tl.store(profile.sums + at, sums)
    if p_counts is not None:
        tl.store(p_counts + at, counts)


def make_profile(problem: Problem, edges: Tensor, rows: tuple[int, ...]) -> Profile:
    """The bins between sorted edges, and memory for their partial sums."""
    device, bins = edges.device, edges.numel() + 1
    origin = problem.offset - (problem.keys - 1)
    least, most = -(2**30), 2**30
    distances = torch.arange(origin, problem.queries + problem.offset, device=device)
    columns = triton.next_power_of_2(bins)
    return Profile(
        sums=torch.empty(*rows, columns, device=device),
        edges=pad(pad(edges.clamp(least, most), (1, 0), value=least), (0, 1), value=most).int(),
        bin_of=torch.searchsorted(edges, distances, right=True).int(),
        origin=origin,
        bins=tl.constexpr(columns),
    )

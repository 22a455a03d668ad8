"""Which range of keys each query can see by what masks hold: padding, documents, boolean masks (backend `tiled`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnlab_kernels.problem import Problem

ROWS = 16
"""Rows of a boolean mask that are looked at together."""


@dataclass(frozen=True, eq=False)
class Reach:
    """Ranges of keys, [b or 1, i] on the CPU: outside of `first` to `stop` a query sees nothing; None for no bounds.

    `changes` [b, i + 1] is True where a query is of another document than the one before, and at both ends.
    """

    keys: int
    first: Tensor | None = None
    stop: Tensor | None = None
    changes: Tensor | None = None

    def of(self, b: slice, i: slice) -> tuple[int, int]:
        """The range that holds those of all queries of a tile."""
        if self.first is None or self.stop is None:
            return 0, self.keys
        first, stop = (t[b if len(t) > 1 else slice(0, 1), i] for t in (self.first, self.stop))
        some = first < stop
        if not bool(some.any()):
            return 0, 0
        return int(first[some].min()), int(stop[some].max())

    def aligned(self, b: slice, start: int, stop: int, shortest: int) -> int:
        """Where a tile that starts here best ends: at the end of its document, or of the last that is whole."""
        if self.changes is None or b.stop - b.start > 1:
            return stop
        ends = self.changes[b.start, start + 1 : stop + 1].nonzero().squeeze(1)
        long = ends[ends + 1 >= shortest]
        if not len(long):
            return stop
        # The document that begins here, if it is long; else short ones together, up to where the last of them ends.
        end = int(long[0]) if len(long) == len(ends) else int(long[-1])
        return start + 1 + end


def key_reach(problem: Problem) -> Reach:
    """The ranges that the masks of a problem leave."""
    n_q, n_k = problem.queries, problem.keys
    bounded = problem.key_mask is not None or problem.query_segments is not None or problem.mask is not None
    if not (n_k and bounded):
        return Reach(n_k)
    first, stop = torch.zeros(1, n_q, dtype=torch.long), torch.full((1, n_q), n_k)
    changes = None
    if problem.key_mask is not None:
        some_first, some_stop = _ends(problem.key_mask.cpu())
        first, stop = torch.maximum(first, some_first[:, None]), torch.minimum(stop, some_stop[:, None])
    if problem.query_segments is not None and problem.key_segments is not None:
        queries, keys = problem.query_segments.cpu(), problem.key_segments.cpu()
        own_first, own_stop = _documents(queries, keys)
        first, stop = torch.maximum(first, own_first), torch.minimum(stop, own_stop)
        changes = pad(queries[:, 1:] != queries[:, :-1], (1, 1), value=True)
    if problem.mask is not None and problem.mask.shape[2] > 1 and problem.mask.shape[3] > 1:
        own_first, own_stop = _of_mask(problem.mask)
        first, stop = torch.maximum(first, own_first), torch.minimum(stop, own_stop)
    return Reach(n_k, first, stop, changes)


def _ends(exists: Tensor) -> tuple[Tensor, Tensor]:
    """First True along the last axis and the place after the last one; 0 and 0 without any."""
    length = exists.shape[-1]
    bits = exists.view(torch.int8)
    some = exists.any(-1)
    first, last = bits.argmax(-1), length - bits.flip(-1).argmax(-1)
    return torch.where(some, first, 0), torch.where(some, last, 0)


def _documents(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """[b, i], from where to where the keys of each query's document stand."""
    ids, number = keys.unique(return_inverse=True)
    place = torch.arange(keys.shape[1]).expand_as(keys)
    low = torch.full((len(keys), len(ids)), keys.shape[1]).scatter_reduce_(1, number, place, "amin")
    high = torch.zeros(len(keys), len(ids), dtype=torch.long).scatter_reduce_(1, number, place + 1, "amax")
    at = torch.searchsorted(ids, queries.contiguous()).clamp(max=len(ids) - 1)
    found = ids[at] == queries
    return torch.where(found, low.gather(1, at), 0), torch.where(found, high.gather(1, at), 0)


def _of_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """[b, i], the same of a boolean mask, for a few rows and all heads at a time."""
    rows = mask.shape[2]
    whole = rows // ROWS * ROWS
    bits = mask.view(torch.int8)
    some = [bits[:, :, :whole].unflatten(2, (-1, ROWS)).amax((1, 3))] if whole else []
    if whole < rows:
        some.append(bits[:, :, whole:].amax((1, 2))[:, None])
    first, stop = _ends(torch.cat(some, 1).bool().cpu())
    return tuple(t.repeat_interleave(ROWS, 1)[:, :rows] for t in (first, stop))  # type: ignore[return-value]

"""Knock out keys: chosen entries of the pattern are hidden before the softmax, which renormalises over the others.

Attention knockout as in "Dissecting Recall of Factual Associations in Auto-Regressive Language Models" (2304.14767).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnlab.capture.arguments import Arguments
from attnlab.capture.call import Site
from attnlab.capture.intervention import PatternEdit, Plain, Solver, Variant
from attnlab.capture.where import Indices, first_position, read_indices, select_keys

_FEW = 4
"""Up to here different sets of keys are one attention call each; beyond it a boolean mask says which are hidden."""


@dataclass(frozen=True, eq=False)
class KnockOut(PatternEdit):
    """Hide keys from the queries at `positions`, or chosen keys from chosen queries.

    A query that loses all its keys has z = 0 (with a learned sink all its mass goes there).

    Attributes:
        keys: key positions, hidden from every query that is edited: [P], [B, P], or booleans [Nk] or [B, Nk].
        pairs: (query, key) positions [P, 2], in place of `keys`. Their edited rows are computed in a call of their own
            for each set of keys; with more than a few sets a boolean [Nq, Nk] is built, one byte an entry.

    Raises:
        ValueError: neither or both of keys and pairs are given.

    Example:
        >>> KnockOut("L5H1", keys=[0]).describe()
        "KnockOut('L5H1')"
    """

    keys: Indices = None
    pairs: Sequence[tuple[int, int]] | Tensor | None = field(default=None, kw_only=True)

    stage = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.keys is None) == (self.pairs is None):
            raise ValueError(f"{self.describe()} needs either keys or pairs of queries and keys.")
        self._keep("_keys", read_indices("keys", self.keys))
        if self.pairs is not None:
            pairs = read_indices("pairs", torch.as_tensor(self.pairs))
            if pairs is None or pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype == torch.bool:
                raise ValueError(f"pairs is {self.pairs!r}; expected (query, key) positions [P, 2].")
            self._keep("_pairs", pairs)

    def edit(self, solver: Solver, site: Site, heads: tuple[int, ...], backend: str) -> Iterable[Variant]:
        """The problem without the keys."""
        problem, rows = self.plain(solver), self.queries(site)
        if self.keys is not None:
            hidden = select_keys("keys", self.__dict__["_keys"], site)
            if not bool(hidden.any()):
                return []
            return [Variant(rows, Plain(without_keys(problem, hidden)))]
        sets = self._sets(site)
        if len(sets) > _FEW:
            return self._masked(problem, site, sets, rows)
        variants = []
        for keys, queries in sets.items():
            hidden = torch.zeros(1, site.n_keys, dtype=torch.bool, device=site.device)
            hidden[0, list(keys)] = True
            chosen = torch.zeros(1, site.n_queries, dtype=torch.bool, device=site.device)
            chosen[0, queries] = True
            chosen = chosen if rows is None else chosen & rows
            variants.append(Variant(chosen, Plain(without_keys(problem, hidden))))
        return variants

    def _sets(self, site: Site) -> dict[tuple[int, ...], list[int]]:
        """Queries of the call by the set of keys that they lose."""
        start, n_queries, n_keys = first_position(site), site.n_queries, site.n_keys
        lost: dict[int, set[int]] = defaultdict(set)
        for query, key in self.__dict__["_pairs"].tolist():
            i = (query + start + n_queries if query < 0 else query) - start
            j = key + n_keys if key < 0 else key
            if 0 <= i < n_queries and 0 <= j < n_keys:
                lost[i].add(j)
        sets: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, keys in lost.items():
            sets[tuple(sorted(keys))].append(i)
        return sets

    def _masked(
        self, problem: Arguments, site: Site, sets: dict[tuple[int, ...], list[int]], rows: Tensor | None
    ) -> list[Variant]:
        seen = torch.ones(1, 1, site.n_queries, site.n_keys, dtype=torch.bool, device=site.device)
        touched = torch.zeros(1, site.n_queries, dtype=torch.bool, device=site.device)
        for keys, queries in sets.items():
            touched[0, queries] = True
            seen[0, 0, torch.tensor(queries)[:, None], torch.tensor(keys)] = False
        mask = seen if problem.mask is None else problem.mask & seen
        return [Variant(touched if rows is None else touched & rows, Plain(replace(problem, mask=mask)))]


def without_keys(problem: Arguments, hidden: Tensor) -> Arguments:
    """The problem in which the keys of `hidden` [1 or B, Nk] do not exist."""
    left = ~hidden if problem.key_mask is None else problem.key_mask & ~hidden
    return replace(problem, key_mask=left.expand(problem.k.shape[0], -1))

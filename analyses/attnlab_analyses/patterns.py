"""Sparse pattern of each head: which of A-shape, vertical-slash, block-sparse and grid recalls most of its attention.

MInference (arXiv 2407.02490) classes heads by the share of their attention that each pattern keeps at its budget, and
MMInference (arXiv 2504.16083) adds the grid; `patterns_sizes` has the budgets, `patterns_search` the search. It reads
128 rows of each head and no matrix. A sequence votes for the pattern that recalls most; a head's class is that with
most votes. What a pattern recalls has to be read beside the share of visible keys that it keeps, `share_*` in the
table.

Shapes: L layers, H heads, P bins of positions or distances.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import pandas as pd
import plotly.graph_objects as go
import torch
from attnlab_kernels import Emit
from torch import Tensor

from attnlab.capture.call import Call, Site
from attnlab.results import Metric, NamedArray, Result, heads_frame
from attnlab.runs.analysis import Analysis, Batch, Layout, Needs
from attnlab_analyses.last_rows import Group, chosen_rows, groups_of, reads_itself
from attnlab_analyses.moments import HeadMoments
from attnlab_analyses.patterns_figures import WORDS, pattern_figures
from attnlab_analyses.patterns_search import PATTERNS, search
from attnlab_analyses.patterns_sizes import BUDGET, LAST_QUERIES, REFERENCE_LENGTH, ROWS, VERTICAL_SLASH, Options
from attnlab_analyses.rows import sums_by_position
from attnlab_analyses.sentences import counted, heads_named

EDGES = [*range(16), *sorted({*(2**k for k in range(4, 25)), *(3 * 2**k for k in range(3, 24))})]
"""Of keys' positions and of distances: sixteen alone, then two bins to each doubling."""
SHORTEST = 32
"""Tokens of a sequence below which nothing is read: a few hundredths of it are no key."""
METRICS = {
    "recall_a_shape": Metric(
        "Kept by an A-shape", "", "weight on the first and the recent keys at the pattern's budget", 0.0, 1.0
    ),
    "recall_vertical_slash": Metric(
        "Kept by verticals and slashes", "", "weight on chosen keys and distances at the pattern's budget", 0.0, 1.0
    ),
    "recall_block": Metric("Kept by blocks", "", "weight on chosen blocks at the pattern's budget", 0.0, 1.0),
    "recall_grid": Metric("Kept by a grid", "", "weight on every so many keys at the pattern's budget", 0.0, 1.0),
}
_TOLD, _WELL = 6, 0.9


class Patterns(Analysis):
    """The sparse-pattern class of every head, and what each pattern recalls.

    Args:
        layout: of the model's heads.
        last_queries: rows at the end by which patterns are chosen.
        rows: rows, spread evenly, on which what they recall is measured.
        budget: share of a sequence's keys that every pattern may keep; None for the sizes of the published search.
    """

    name: ClassVar[str] = "patterns"
    summary: ClassVar[str] = "sparse-pattern class of each head: A-shape, vertical-slash, block-sparse, grid"

    def __init__(
        self,
        layout: Layout,
        last_queries: int = LAST_QUERIES,
        rows: int = ROWS,
        budget: float | None = BUDGET,
    ) -> None:
        super().__init__(layout)
        self.options = Options(last_queries, rows, budget)
        heads = layout.heads.get("self", ())
        shape = (len(heads), max(heads, default=0))
        self._heads = heads
        self._recall = {name: HeadMoments(heads) for name in PATTERNS}
        self._share = {name: HeadMoments(heads) for name in PATTERNS}
        self._votes = torch.zeros(*shape, len(PATTERNS), dtype=torch.int64)
        self._pairs = torch.zeros(*shape, len(VERTICAL_SLASH), dtype=torch.int64)
        self._strides = torch.zeros(*shape, max(self.options.widths) + 1, dtype=torch.int64)
        self._profiles = {name: torch.zeros(*shape, len(EDGES) - 1, dtype=torch.float64) for name in _PROFILES}
        self._lengths = torch.zeros(3, dtype=torch.float64)  # sequences, tokens, scales
        self._asked: tuple[Batch, Site, list[Group], Emit] | None = None

    @classmethod
    def refusal(cls, layout: Layout) -> str | None:
        """Patterns are of self-attention."""
        return None if "self" in layout.heads else "it has no self-attention, of which sparse patterns are read."

    def needs(self, site: Site, batch: Batch) -> Needs | None:
        """Chosen rows, and queries and keys for blocks; nothing where attention is not causal."""
        if not reads_itself(site) or batch.own:
            return None
        return Needs(self._question(site, batch)[3], qkv=True)

    def _question(self, site: Site, batch: Batch) -> tuple[Batch, Site, list[Group], Emit]:
        """Groups of sequences and their rows; layer after layer shares them."""
        known = self._asked
        if known is None or known[0] is not batch or known[1].n_queries != site.n_queries:
            groups = [group for group in groups_of(site) if group.length >= SHORTEST]
            last = chosen_rows(groups, lambda n: range(n - self.options.sizes(n).last, n), site.batch, site.device)
            rows = chosen_rows(groups, lambda n: self.options.sizes(n).rows, site.batch, site.device)
            known = self._asked = (batch, site, groups, Emit(rows=torch.cat([last, rows], -1)))
        return known

    def update(self, call: Call, batch: Batch) -> None:
        """Takes in what the patterns recall of one layer."""
        emitted, layer = call.emitted, call.layer
        assert emitted.rows is not None
        assert call.q is not None
        assert call.k is not None
        groups = self._question(call.site, batch)[2]
        sizes = [self.options.sizes(group.length) for group in groups]
        most, heads = max((of.last for of in sizes), default=0), call.site.n_heads
        recall = torch.full((call.site.batch, heads, len(PATTERNS)), torch.nan, dtype=torch.float64)
        share = recall.clone()
        for group, of in zip(groups, sizes, strict=True):
            rows = group.of(emitted.rows)
            q, k = group.tokens_of(call.q), group.tokens_of(call.k)
            found = search(rows[:, :, : of.last], rows[:, :, most : most + len(of.rows)], q, k, of, call.site.window)
            members = list(group.members)
            recall[members], share[members] = found.recall, found.share
            counts = ((self._votes, found.chosen), (self._pairs, found.pair), (self._strides, found.stride))
            for total, chosen in counts:
                total[layer, :heads] += torch.nn.functional.one_hot(chosen, total.shape[-1]).sum(0)
            places = torch.arange(group.length).repeat(len(members), 1)
            for name, values in (("vertical", found.vertical), ("slash", found.slash)):
                self._profiles[name][layer, :heads] += sums_by_position(values, places, torch.tensor(EDGES))
            if layer == 0:
                self._lengths += torch.tensor([1.0, group.length, of.scale], dtype=torch.float64) * len(members)
        metrics = {}
        for number, name in enumerate(PATTERNS):
            self._recall[name].add(layer, recall[..., number])
            self._share[name].add(layer, share[..., number])
            metrics[f"recall_{name}"] = recall[..., number]
        self.record(call, batch, metrics)

    def merge(self, other: Self) -> None:
        """Adds the state of the data that follows."""
        for name in PATTERNS:
            self._recall[name].merge(other._recall[name])
            self._share[name].merge(other._share[name])
        for name in _PROFILES:
            self._profiles[name] += other._profiles[name]
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state as tensors."""
        state = {name.strip("_"): getattr(self, name) for name in _COUNTS} | self._profiles
        for name in PATTERNS:
            state |= self._recall[name].state_dict(f"recall.{name}") | self._share[name].state_dict(f"share.{name}")
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes the state that `state_dict` gave."""
        for name in _COUNTS:
            setattr(self, name, state[name.strip("_")].clone())
        for name in _PROFILES:
            self._profiles[name] = state[name].clone()
        for name in PATTERNS:
            self._recall[name].load_state_dict(state, f"recall.{name}")
            self._share[name].load_state_dict(state, f"share.{name}")

    def result(self) -> Result:
        """Recall by pattern and head, the table of classes, and where the last rows look."""
        table = pd.DataFrame(self._table_rows())
        arrays = self._arrays() if len(table) else {}
        return Result(
            self.name, tuple(self._findings(table)), heads_frame(self._head_rows()), table, arrays, metrics=METRICS
        )

    @classmethod
    def figures(cls, result: Result) -> dict[str, go.Figure]:
        """The class of every head, what each pattern recalls, and where the last rows look."""
        return pattern_figures(result)

    def _head_rows(self) -> list[tuple[object, ...]]:
        found: list[tuple[object, ...]] = []
        for name in PATTERNS:
            moments = self._recall[name]
            stderr = moments.stderr()
            for layer, head in heads_named(self._heads):
                if n := int(moments.count[layer, head]):
                    values = float(moments.mean[layer, head]), float(stderr[layer, head])
                    found.append((layer, head, "self", f"recall_{name}", *values, n))
        return found

    def _table_rows(self) -> list[dict[str, object]]:
        rows = []
        for (layer, head), name in heads_named(self._heads).items():
            votes = self._votes[layer, head]
            if not int(votes.sum()):
                continue
            chosen = int(votes.argmax())
            pair = VERTICAL_SLASH[int(self._pairs[layer, head].argmax())]
            shares = {f"share_{p}": float(self._share[p].mean[layer, head]) for p in PATTERNS}
            rows.append(
                {
                    "kind": "self",
                    "layer": layer,
                    "head": head,
                    "name": name,
                    "pattern": PATTERNS[chosen],
                    "votes": float(votes[chosen] / votes.sum()),
                    "recall": float(self._recall[PATTERNS[chosen]].mean[layer, head]),
                    "share": shares[f"share_{PATTERNS[chosen]}"],
                    "vertical_slash": f"{pair[0]}, {pair[1]}",
                    "stride": int(self._strides[layer, head].argmax()),
                    "scale": float(self._lengths[2] / self._lengths[0]),
                    **shares,
                }
            )
        return rows

    def _arrays(self) -> dict[str, NamedArray]:
        count = self._votes.sum(-1, keepdim=True).clamp(min=1)
        whole = sum(total.sum((0, 1)) for total in self._profiles.values())
        used = int(torch.as_tensor(whole).nonzero().max()) + 1
        axes, where = ("layer", "head", "position"), {"position": EDGES[: used + 1]}
        return {
            f"self.{name}": NamedArray(
                (total[..., :used] / count).numpy(), axes, where, "attention", f"Mean mass of a last row by {by}."
            )
            for (name, total), by in zip(self._profiles.items(), _PROFILES.values(), strict=True)
        }

    def _findings(self, table: pd.DataFrame) -> list[str]:
        if not len(table):
            return [f"No causal self-attention of {SHORTEST} tokens or more was read, of which patterns are told."]
        found = []
        sequences, tokens, scales = self._lengths.tolist()
        for pattern in table["pattern"].value_counts().index:
            rows = table[table["pattern"] == pattern].sort_values("recall", ascending=False)
            listed = ", ".join(f"{r.name} ({r.recall:.2f})" for r in rows.head(_TOLD).itertuples(index=False))
            more = f" and {len(rows) - _TOLD} more" if len(rows) > _TOLD else ""
            found.append(
                f"{counted(len(rows), 'head')} {'is' if len(rows) == 1 else 'are'} {WORDS[pattern]} "
                f"({rows['share'].mean():.1%} of the visible keys kept): {listed}{more}."
            )
        poorly = int((table["recall"] < _WELL).sum())
        if poorly:
            found.append(f"In {counted(poorly, 'head')} no pattern recalls {_WELL:.0%} of the attention.")
        budget, scale, length = self.options.budget, scales / sequences, tokens / sequences
        if budget is not None:
            found.append(
                f"Every pattern was given {budget:.3g} of a sequence's keys, of {length:,.0f} tokens on average: "
                f"{budget * length:.3g} keys."
            )
        elif scale < 1:
            found.append(
                f"Published sizes in keys were multiplied by {scale:.3g}: the sequences have {length:,.0f} tokens on "
                f"average, the search that they come from had {REFERENCE_LENGTH:,}."
            )
        return found


_COUNTS = ("_votes", "_pairs", "_strides", "_lengths")
_PROFILES = {"vertical": "position of the key", "slash": "distance"}

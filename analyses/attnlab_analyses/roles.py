"""Head roles: which heads look at the token before, at earlier copies, at what followed these, at the first token.

Each role is a score by head (`roles_scores`), a threshold that is applied to each sequence (`roles_definitions`), and a
majority: a head has a role when more than that share of its sequences passes. `duplicate_token` and `induction` are
measured on random tokens repeated once, which the analysis brings along (`roles_repeats`); everything else, and the
same two by TransformerLens' detector, on the data. Cross-attention has no offsets and takes no part.

Shapes: L layers, H heads, B sequences.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import pandas as pd
import plotly.graph_objects as go
import torch
from torch import Tensor

from attnlab.capture.call import Call, Kind, Site
from attnlab.errors import AttnlabError
from attnlab.results import Result, heads_frame
from attnlab.runs.analysis import Batch, Layout, Needs
from attnlab_analyses.by_kind import AnalysisByKind
from attnlab_analyses.moments import HeadMoments
from attnlab_analyses.roles_definitions import METRICS, ROLES, Role, resolved_thresholds
from attnlab_analyses.roles_figures import role_figures
from attnlab_analyses.roles_repeats import repeated_tokens
from attnlab_analyses.roles_scores import Question, RepeatQuestion, Scores, Tokens, ask, ask_of_repeats
from attnlab_analyses.roles_tokens import delimiters, end_tokens
from attnlab_analyses.sentences import heads_named, kind_named, kinds_in_order

if TYPE_CHECKING:
    from attnlab.models import Model
    from attnlab.runs.data import Sequences

WINDOW = 4
"""Keys at most so many tokens away are near."""
FIRST_ROWS = 64
"""Rows over which the mass on the first token is measured: the sequence length at which Gu et al. do."""
DETECTOR_LENGTH = 16384
"""Most tokens of a sequence on which the detectors are read: each row brings 1 to 2 sqrt(N) numbers for them."""
PERIOD, REPEATS = 64, 16
"""Random tokens before they are repeated, and sequences of these."""
_TOLD = 6


class Roles(AnalysisByKind["_Kind"]):
    """The roles of every head, and the scores that they rest on."""

    name: ClassVar[str] = "roles"
    summary: ClassVar[str] = (
        "head roles: previous-token, duplicate-token, induction, sink, local, delimiter, positional"
    )

    def __init__(
        self,
        layout: Layout,
        thresholds: Mapping[str, float] | None = None,
        majority: float = 0.5,
        window: int = WINDOW,
        first_rows: int = FIRST_ROWS,
        detector_length: int = DETECTOR_LENGTH,
        period: int = PERIOD,
        repeats: int = REPEATS,
    ) -> None:
        self.thresholds = resolved_thresholds(thresholds)
        if isinstance(majority, bool) or not isinstance(majority, int | float) or not 0 <= majority < 1:
            raise AttnlabError(f"The majority is a share of sequences, from 0 to below 1; got {majority!r}.")
        at_least = {
            "window": (window, 1), "first_rows": (first_rows, 1), "detector_length": (detector_length, 0),
            "period": (period, 2), "repeats": (repeats, 1),
        }  # fmt: skip
        for name, (value, least) in at_least.items():
            if type(value) is not int or value < least:
                raise AttnlabError(f"The option {name!r} is a whole number of at least {least}; got {value!r}.")
        self.majority = float(majority)
        self.window, self.first_rows, self.detector_length = window, first_rows, detector_length
        self.period, self.repeats = period, repeats
        texts = layout.tokens
        self._delimiters = delimiters(texts) if texts is not None else None
        self._ends = end_tokens(texts) if texts is not None else None
        self._asked: dict[tuple[object, ...], tuple[Batch, Question | RepeatQuestion]] = {}
        kinds = [(kind, heads) for kind, heads in kinds_in_order(layout.heads) if kind != "cross"]
        super().__init__(layout, {kind: _Kind(kind, heads, self) for kind, heads in kinds})

    @classmethod
    def refusal(cls, layout: Layout) -> str | None:
        """Roles are of self-attention."""
        return None if set(layout.heads) - {"cross"} else "it has no self-attention, of which roles are read."

    def own_sequences(self, model: Model, longest: int | None, seed: int) -> Sequences | None:
        """Random tokens that come twice."""
        return repeated_tokens(model, longest, period=self.period, count=self.repeats, seed=seed)

    def needs(self, site: Site, batch: Batch) -> Needs | None:
        """Entries at chosen keys, few columns, and each row's largest entry; nothing of cross-attention."""
        question = self._question(site, batch)
        return None if question is None else Needs(question.emit)

    def update(self, call: Call, batch: Batch) -> None:
        """Takes in the scores of one layer."""
        question = self._question(call.site, batch)
        assert question is not None
        scores = question.scores(call)
        self._kinds[call.kind].add(call.layer, scores)
        self.record(call, batch, scores)

    def _question(self, site: Site, batch: Batch) -> Question | RepeatQuestion | None:
        """What is asked at a site; calls that are alike, layer after layer, share it."""
        if site.kind == "cross":
            return None
        alike = (site.kind, site.causal, site.n_queries, site.n_keys, site.query_offset, site.key_mask is None)
        known = self._asked.get(alike)
        if known is not None and known[0] is batch:
            return known[1]
        tokens = self._tokens(site, batch)
        if batch.own:
            question: Question | RepeatQuestion | None = None if tokens is None else ask_of_repeats(tokens)
        else:
            question = ask(
                site, tokens, window=self.window, first_rows=self.first_rows, detector_length=self.detector_length
            )
        if question is not None:
            self._asked = {key: entry for key, entry in self._asked.items() if entry[0] is batch}
            self._asked[alike] = (batch, question)
        return question

    def _tokens(self, site: Site, batch: Batch) -> Tokens | None:
        ids, there = batch.input_ids, batch.attention_mask
        if "encoder" in self.layout.heads and site.kind == "self":
            if batch.decoder_input_ids is None or batch.decoder_attention_mask is None:
                return None
            ids, there = batch.decoder_input_ids, batch.decoder_attention_mask
        alike = ids.shape[-1] == site.n_keys == site.n_queries and site.query_offset == 0
        if not alike or site.keys.unit not in ("tokens", "unknown"):
            return None
        device = site.device
        parts = (None if known is None else known.to(device) for known in (self._delimiters, self._ends))
        return Tokens(ids.to(device), there.to(device), *parts)

    def result(self) -> Result:
        """Scores by head, and the table of the roles."""
        kinds = self.seen_kinds()
        rows = [row for state in kinds for row in state.table_rows()]
        return Result(
            analysis=self.name,
            findings=tuple(sentence for state in kinds for sentence in state.findings(len(kinds) > 1)),
            heads=heads_frame(row for state in kinds for row in state.head_rows()),
            table=pd.DataFrame(rows),
            arrays={},
            metrics=METRICS,
        )

    @classmethod
    def figures(cls, result: Result) -> dict[str, go.Figure]:
        """The roles of all heads at a glance, then the map of each score."""
        return role_figures(result)


class _Kind:
    """The state of one kind of attention."""

    def __init__(self, kind: Kind, heads: tuple[int, ...], options: Roles) -> None:
        self.kind, self.n_heads = kind, heads
        self.thresholds, self.majority = options.thresholds, options.majority
        self.metrics = {metric: HeadMoments(heads) for metric in METRICS}
        shape = (len(heads), max(heads, default=0))
        self.hits = {role.name: torch.zeros(shape, dtype=torch.int64) for role in ROLES}

    def seen(self) -> bool:
        return any(bool((moments.count > 0).any()) for moments in self.metrics.values())

    def add(self, layer: int, scores: Scores) -> None:
        for metric, values in scores.items():
            self.metrics[metric].add(layer, values)
        for role in ROLES:
            if role.score in scores:
                passed = role.passes(scores[role.score], self.thresholds[role.name]).sum(0).cpu()
                self.hits[role.name][layer, : len(passed)] += passed

    def merge(self, other: _Kind) -> None:
        for metric, moments in self.metrics.items():
            moments.merge(other.metrics[metric])
        for name in self.hits:
            self.hits[name] += other.hits[name]

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"hits.{name}": hits for name, hits in self.hits.items()}
        for name, moments in self.metrics.items():
            state |= moments.state_dict(name)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name in self.hits:
            self.hits[name] = state[f"hits.{name}"].clone()
        for name, moments in self.metrics.items():
            moments.load_state_dict(state, name)

    def rate(self, role: Role) -> Tensor:
        """Share of the sequences that pass, [L, H]; NaN where the score was never measured."""
        count = self.metrics[role.score].count
        return torch.where(count > 0, self.hits[role.name] / count.clamp(min=1), torch.nan)

    def roles_of(self, place: tuple[int, int]) -> list[str]:
        return [role.name for role in ROLES if float(self.rate(role)[place]) > self.majority]

    def head_rows(self) -> list[tuple[object, ...]]:
        found: list[tuple[object, ...]] = []
        for metric, (layer, head) in itertools.product(self.metrics, heads_named(self.n_heads)):
            moments = self.metrics[metric]
            n = int(moments.count[layer, head])
            if n:
                value, stderr = float(moments.mean[layer, head]), float(moments.stderr()[layer, head])
                found.append((layer, head, self.kind, metric, value, stderr, n))
        return found

    def table_rows(self) -> list[dict[str, object]]:
        rates = {role.name: self.rate(role).tolist() for role in ROLES}
        return [
            {
                "kind": self.kind,
                "layer": i,
                "head": j,
                "name": name,
                "roles": ", ".join(self.roles_of((i, j))),
                **{f"{role}_rate": rate[i][j] for role, rate in rates.items()},
            }
            for (i, j), name in heads_named(self.n_heads).items()
        ]

    def findings(self, several: bool) -> list[str]:
        where = f" ({kind_named(self.kind)})" if several else ""
        named = heads_named(self.n_heads)
        found, none = [], []
        for role in ROLES:
            if not bool((self.metrics[role.score].count > 0).any()):
                continue
            mean, rate = self.metrics[role.score].mean, self.rate(role)
            holders = [(float(mean[place]), name) for place, name in named.items() if rate[place] > self.majority]
            if not holders:
                none.append(role.words)
                continue
            holders.sort(reverse=True)
            listed = ", ".join(f"{name} ({value:.2f})" for value, name in holders[:_TOLD])
            more = f" and {len(holders) - _TOLD} more" if len(holders) > _TOLD else ""
            heads = "head" if len(holders) == 1 else "heads"
            found.append(f"{len(holders)} {role.words} {heads}{where}: {listed}{more}.")
        if none:
            found.append(f"No {' or '.join([', '.join(none[:-1]), none[-1]] if len(none) > 1 else none)} head{where}.")
        return found

"""What the entropy analysis gathers of one kind of attention: moments, histogram and profiles by head.

Shapes: L layers, H heads, B sequences, Nq queries, K bins of the histogram, P bins of positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from attnlab.capture.call import Call, Kind
from attnlab.results import Metric, NamedArray
from attnlab_analyses.entropy_classes import ClassEntropy
from attnlab_analyses.entropy_rows import BINS, histogram_of, moments_over_rows, quantiles_of, row_statistics
from attnlab_analyses.moments import HeadMoments
from attnlab_analyses.rows import mean_over_rows, positions, sums_by_position
from attnlab_analyses.sentences import counted, heads_named, kind_named

EDGES = sorted({0, 1, 2, *(2**k for k in range(1, 25)), *(3 * 2**k for k in range(24))})
"""Edges of the bins of positions: two to each doubling."""
METRICS = {
    "entropy": Metric("Attention entropy", "nats", "mean over query rows of -Σ A ln A", 0.0),
    "entropy_normalized": Metric(
        "Normalised attention entropy", "", "entropy over the log of the visible keys: 0 one key, 1 uniform", 0.0, 1.0
    ),
    "effective_keys": Metric("Effective keys", "keys", "1 / Σ A², the number of keys that a row really uses", 0.0),
    "max_probability": Metric("Largest weight", "", "mean over query rows of the largest entry", 0.0, 1.0),
    "distance": Metric("Attention distance", "tokens", "mean over query rows of how far back the attended keys lie"),
    "collapsed": Metric("Collapsed", "", "share of sequences with a normalised entropy below the threshold", 0.0, 1.0),
    "entropy_bound": Metric(
        "Lower bound on entropy", "nats", "mean over query rows of the least that the norm of their logits allows", 0.0
    ),
}
PROFILES = ("entropy", "entropy_normalized", "distance")
_WORDS = {"entropy": "entropy", "entropy_normalized": "normalised entropy", "distance": "attention distance"}


class KindEntropy:
    """The state of one kind of attention.

    Args:
        kind: which.
        heads: number of heads of each layer.
        threshold: normalised entropy below which a sequence counts as collapsed.
    """

    def __init__(self, kind: Kind, heads: tuple[int, ...], threshold: float) -> None:
        self.kind, self.n_heads, self.threshold = kind, heads, threshold
        self.metrics = [m for m in METRICS if kind != "cross" or m != "distance"]
        self.profiles = [m for m in PROFILES if m in self.metrics]
        shape = (len(heads), max(heads, default=0))
        self.sequences = {metric: HeadMoments(heads) for metric in (*self.metrics, "logit_norm")}
        self.rows = {metric: HeadMoments(heads) for metric in ("entropy", "entropy_normalized")}
        self.histogram = torch.zeros(*shape, BINS, dtype=torch.int64)
        bins = len(EDGES) - 1
        self.sums = {metric: torch.zeros(*shape, bins, dtype=torch.float64) for metric in self.profiles}
        self.counts = {metric: torch.zeros(*shape, bins, dtype=torch.float64) for metric in self.profiles}
        self.classes = ClassEntropy(heads)

    def seen(self) -> bool:
        """Whether any sequence has come."""
        return bool((self.sequences["entropy"].count > 0).any())

    def update(self, call: Call, classes: Tensor | None) -> dict[str, Tensor]:
        """Takes in one layer; the metrics of each sequence, [B, H].

        Args:
            call: the layer's.
            classes: [B, Nq] of the query tokens, None where these are unknown.
        """
        site, layer = call.site, call.layer
        statistics, visible, rows = row_statistics(call)
        spread = rows & (visible > 1)
        heads = site.n_heads
        columns, means = [], {}
        for metric, values in statistics.items():
            members = spread if metric == "entropy_normalized" else rows
            members = members & ~values.isnan()
            means[metric] = mean_over_rows(values, members)
            self.sequences[metric].add(layer, means[metric])
            if metric in self.rows:
                self.rows[metric].add_moments(layer, *moments_over_rows(values, members))
            if metric in self.profiles:
                columns += [torch.where(members, values, 0.0), members.to(values.dtype)]
        normalized = means["entropy_normalized"]
        means["collapsed"] = torch.where(normalized.isnan(), torch.nan, (normalized < self.threshold).double())
        self.sequences["collapsed"].add(layer, means["collapsed"])
        bins = int(np.searchsorted(EDGES, site.n_queries))
        by_position = sums_by_position(torch.cat(columns, dim=1), positions(rows), torch.tensor(EDGES[: bins + 1]))
        parts = by_position.split(heads)
        for place, metric in enumerate(self.profiles):
            self.sums[metric][layer, :heads, :bins] += parts[2 * place]
            self.counts[metric][layer, :heads, :bins] += parts[2 * place + 1]
        self.histogram[layer, :heads] += histogram_of(statistics["entropy_normalized"], spread)
        if classes is not None:
            self.classes.update(layer, statistics, rows, spread, classes)
        return {metric: values for metric, values in means.items() if metric in self.metrics}

    def merge(self, other: KindEntropy) -> None:
        """Adds the state of the data that follows."""
        for mine, theirs in ((self.sequences, other.sequences), (self.rows, other.rows)):
            for metric in mine:
                mine[metric].merge(theirs[metric])
        self.histogram += other.histogram
        for metric in self.profiles:
            self.sums[metric] += other.sums[metric]
            self.counts[metric] += other.counts[metric]
        self.classes.merge(other.classes)

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state."""
        state = {"histogram": self.histogram} | self.classes.state_dict()
        for name, moments in self._moments():
            state |= moments.state_dict(name)
        for metric in self.profiles:
            state |= {f"sums.{metric}": self.sums[metric], f"counts.{metric}": self.counts[metric]}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes the state that `state_dict` gave."""
        self.histogram = state["histogram"].clone()
        self.classes.load_state_dict(state)
        for name, moments in self._moments():
            moments.load_state_dict(state, name)
        for metric in self.profiles:
            self.sums[metric] = state[f"sums.{metric}"].clone()
            self.counts[metric] = state[f"counts.{metric}"].clone()

    def _moments(self) -> list[tuple[str, HeadMoments]]:
        groups = (("sequences", self.sequences), ("rows", self.rows))
        return [(f"{group}.{metric}", moments) for group, several in groups for metric, moments in several.items()]

    def _heads(self) -> list[tuple[int, int]]:
        return [(layer, head) for layer, n in enumerate(self.n_heads) for head in range(n)]

    def head_rows(self) -> list[tuple[object, ...]]:
        """Tidy rows of all metrics."""
        found: list[tuple[object, ...]] = []
        for metric, (layer, head) in itertools.product(self.metrics, self._heads()):
            moments = self.sequences[metric]
            n = int(moments.count[layer, head])
            if n:
                value, stderr = float(moments.mean[layer, head]), float(moments.stderr()[layer, head])
                found.append((layer, head, self.kind, metric, value, stderr, n))
        return found

    def table_rows(self) -> list[dict[str, object]]:
        """The table: a row for each head."""
        means = {metric: moments.mean.tolist() for metric, moments in self.sequences.items()}
        over_rows = {metric: moments.sd().tolist() for metric, moments in self.rows.items()}
        over_sequences = {metric: self.sequences[metric].sd().tolist() for metric in self.rows}
        bounded = (self.sequences["entropy_bound"].count > 0).tolist()
        quantiles = quantiles_of(self.histogram.numpy())
        return [
            {
                "kind": self.kind,
                "layer": i,
                "head": j,
                "name": f"L{i}H{j}",
                "entropy": means["entropy"][i][j],
                "entropy_sd_rows": over_rows["entropy"][i][j],
                "entropy_sd_sequences": over_sequences["entropy"][i][j],
                "normalized": means["entropy_normalized"][i][j],
                "normalized_sd_rows": over_rows["entropy_normalized"][i][j],
                "normalized_sd_sequences": over_sequences["entropy_normalized"][i][j],
                "normalized_p10": quantiles[0, i, j],
                "normalized_median": quantiles[1, i, j],
                "normalized_p90": quantiles[2, i, j],
                "effective_keys": means["effective_keys"][i][j],
                "collapsed": means["collapsed"][i][j] if self.sequences["collapsed"].count[i, j] else float("nan"),
                "entropy_bound": means["entropy_bound"][i][j] if bounded[i][j] else float("nan"),
                "logit_norm": means["logit_norm"][i][j] if bounded[i][j] else float("nan"),
                "rows": int(self.rows["entropy"].count[i, j]),
                "sequences": int(self.sequences["entropy"].count[i, j]),
                **self.classes.columns(i, j),
            }
            for i, j in self._heads()
            if self.sequences["entropy"].count[i, j] > 0
        ]

    def arrays(self) -> dict[str, NamedArray]:
        """Histogram, profiles and classes of tokens by name."""
        axes = ("layer", "head", "bin")
        edges = [k / BINS for k in range(BINS + 1)]
        found = {
            f"{self.kind}.histogram": NamedArray(
                self.histogram.numpy(), axes, {"bin": edges}, "rows", "Query rows by normalised entropy."
            )
        }
        used = max(1, int(self.counts["entropy"].sum((0, 1)).nonzero().max()) + 1)
        axes, where = ("layer", "head", "position"), {"position": EDGES[: used + 1]}
        units = {"entropy": "nats", "entropy_normalized": "", "distance": "tokens"}
        for metric in self.profiles:
            mean = torch.where(self.counts[metric] > 0, self.sums[metric] / self.counts[metric].clamp(min=1), torch.nan)
            found[f"{self.kind}.{metric}_by_position"] = NamedArray(
                mean[..., :used].numpy(), axes, where, units[metric], f"Mean {_WORDS[metric]} of the rows at a position"
            )
        found[f"{self.kind}.rows_by_position"] = NamedArray(
            self.counts["entropy"][..., :used].numpy(), axes, where, "rows", "Rows at a position."
        )
        return found | self.classes.arrays(self.kind)

    def findings(self, several: bool) -> list[str]:
        """What is to be told of it; `several` kinds are told apart."""
        where = f" ({kind_named(self.kind)})" if several else ""
        normalized, keys = self.sequences["entropy_normalized"], self.sequences["effective_keys"]
        named = heads_named(self.n_heads)
        found = []
        measured = [(float(normalized.mean[i, j]), name) for (i, j), name in named.items() if normalized.count[i, j]]
        if measured:
            low, high = min(measured), max(measured)
            average = sum(value for value, _ in measured) / len(measured)
            found.append(
                f"Normalised entropy{where} averages {average:.2f} over {counted(len(measured), 'head')} (0 one key, 1 "
                f"uniform): the most focused is {low[1]} ({low[0]:.2f}), the most diffuse {high[1]} ({high[0]:.2f})."
            )
        few = [name for (i, j), name in named.items() if keys.count[i, j] and keys.mean[i, j] < 2]
        if few:
            listed = ", ".join(few[:6]) + (f" and {len(few) - 6} more" if len(few) > 6 else "")
            found.append(f"{len(few)} of {len(named)} heads{where} use fewer than 2 keys a row on average: {listed}.")
        hits = self.sequences["collapsed"]
        collapsed = [name for (i, j), name in named.items() if hits.count[i, j] and hits.mean[i, j] > 0.5]
        if collapsed:
            listed = ", ".join(collapsed[:6]) + (f" and {len(collapsed) - 6} more" if len(collapsed) > 6 else "")
            verb = "is" if len(collapsed) == 1 else "are"
            found.append(
                f"{len(collapsed)} of {len(named)} heads{where} {verb} below the collapse threshold (normalised "
                f"entropy under {self.threshold:g} in more than half of the sequences): {listed}. Heads that look at "
                "one place on purpose, such as the token before, are too."
            )
        if (by_class := self.classes.finding(where)) is not None:
            found.append(by_class)
        if "distance" in self.sequences:
            distance = self.sequences["distance"]
            reach = [(float(distance.mean[i, j]), name) for (i, j), name in named.items() if distance.count[i, j]]
            near, far = min(reach), max(reach)
            # Looking both ways the mean says little of how far a head looks.
            if near[0] >= 0:
                found.append(
                    f"The head that looks nearest{where} is {near[1]} ({near[0]:.1f} tokens back on average), "
                    f"the farthest {far[1]} ({far[0]:.1f})."
                )
        return found

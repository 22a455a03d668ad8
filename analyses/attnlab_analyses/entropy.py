"""How widely each head spreads its attention: entropy, effective keys, distance, their spread and where they arise.

H_i = -sum_j A_ij ln A_ij of each query row, in nats (the entropy of Zhai et al., "Stabilizing Transformer Training by
Preventing Attention Entropy Collapse", arXiv 2303.06296), with the paper's lower bound beside it, by position and by
class of the token that asks. Means are taken over the rows of a sequence, then over sequences. Rows of padding and rows
that see no key never count.
"""

from __future__ import annotations

from typing import ClassVar

import pandas as pd
import plotly.graph_objects as go
import torch
from attnlab_kernels import Emit
from torch import Tensor

from attnlab.capture.call import Call, Site
from attnlab.errors import AttnlabError
from attnlab.monitor.rows import COLLAPSED
from attnlab.plots import head_map, profile
from attnlab.results import Result, heads_frame
from attnlab.runs.analysis import Batch, Layout, Needs
from attnlab_analyses.by_kind import AnalysisByKind
from attnlab_analyses.entropy_figures import by_class, distribution
from attnlab_analyses.entropy_kind import METRICS, KindEntropy
from attnlab_analyses.entropy_rows import centred_positions
from attnlab_analyses.entropy_tokens import query_classes
from attnlab_analyses.sentences import kind_named, kinds_in_order

_SAYS_SOMETHING = {"collapsed": 0.0, "entropy_bound": 0.01}
"""Maps that are drawn only where a head is above this."""


class Entropy(AnalysisByKind[KindEntropy]):
    """Entropy of attention by head: mean, spread over rows and sequences, distribution, by position and by token.

    Args:
        layout: of the model.
        threshold: normalised entropy below which a head has collapsed in a sequence.
    """

    name: ClassVar[str] = "entropy"
    summary: ClassVar[str] = "how widely each head attends: entropy, effective keys, distance, by head, position, token"

    def __init__(self, layout: Layout, threshold: float = COLLAPSED) -> None:
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
            raise AttnlabError(f"The threshold is a normalised entropy from 0 to 1; got {threshold!r}.")
        kinds = {kind: KindEntropy(kind, heads, float(threshold)) for kind, heads in kinds_in_order(layout.heads)}
        super().__init__(layout, kinds)
        self._classes: tuple[Batch, dict[tuple[object, ...], Tensor | None]] | None = None

    def needs(self, site: Site, batch: Batch) -> Needs:
        """Row statistics in the forward itself; the keys' own mass and the attended position as more value columns.

        Queries and keys give the bound, where nothing is added to their products.
        """
        columns = [torch.ones(site.n_keys, device=site.device)]
        if site.kind != "cross":
            columns.append(centred_positions(site))
        probes = torch.stack(columns, dim=-1)
        emit = Emit(entropy=True, collision=True, max_probability=True, visible=True, key_probes=probes)
        return Needs(emit, qkv=not site.biased)

    def update(self, call: Call, batch: Batch) -> None:
        """Takes in the row statistics of one layer."""
        self.record(call, batch, self._kinds[call.kind].update(call, self._classes_of(call.site, batch)))

    def _classes_of(self, site: Site, batch: Batch) -> Tensor | None:
        """The classes of the queries, [B, Nq]; layers that are alike share them."""
        if self._classes is None or self._classes[0] is not batch:
            self._classes = (batch, {})
        known = self._classes[1]
        alike = (site.kind, site.n_queries, site.n_keys, site.query_offset, site.keys.unit, site.device)
        if alike not in known:
            known[alike] = query_classes(self.layout, site, batch)
        return known[alike]

    def result(self) -> Result:
        """Means with standard errors, a table of spreads, histograms and profiles."""
        kinds = self.seen_kinds()
        return Result(
            analysis=self.name,
            findings=tuple(sentence for state in kinds for sentence in state.findings(len(kinds) > 1)),
            heads=heads_frame(row for state in kinds for row in state.head_rows()),
            table=pd.DataFrame([row for state in kinds for row in state.table_rows()]),
            arrays={name: array for state in kinds for name, array in state.arrays().items()},
            metrics=METRICS,
        )

    @classmethod
    def figures(cls, result: Result) -> dict[str, go.Figure]:
        """Maps of each metric, then by kind the distribution of the normalised entropy, by token and over position."""
        found = {metric: head_map(result, metric) for metric in _telling(result)}
        for kind in dict.fromkeys(result.heads["kind"]):
            suffix = "" if kind == "self" else f"_{kind}"
            where = kind_named(kind)
            histogram = result.arrays[f"{kind}.histogram"]
            found[f"distribution{suffix}"] = distribution(histogram, f"Distribution of normalised entropy, {where}")
            if f"{kind}.entropy_normalized_by_class" in result.arrays:
                means = result.arrays[f"{kind}.entropy_normalized_by_class"]
                found[f"by_token{suffix}"] = by_class(means, f"Normalised entropy by token, {where}")
            for metric, title in (("entropy", "Entropy by position"), ("distance", "Distance by position")):
                if f"{kind}.{metric}_by_position" in result.arrays:
                    means = result.arrays[f"{kind}.{metric}_by_position"]
                    found[f"{metric}_by_position{suffix}"] = profile(
                        means.values,
                        list(means.coordinates["position"]),
                        f"{title}, {where}",
                        f"{means.description} ({means.unit})",
                        unit=means.unit,
                        weights=result.arrays[f"{kind}.rows_by_position"].values,
                    )
        order = ("entropy_normalized", "distribution", "by_token")
        return {name: found[name] for name in sorted(found, key=lambda n: order.index(n) if n in order else len(order))}


def _telling(result: Result) -> list[str]:
    highest = result.heads.groupby("metric")["value"].max()
    return [name for name in METRICS if name in highest and highest[name] > _SAYS_SOMETHING.get(name, -float("inf"))]

"""Streaming heads, measured: what a head loses when it sees the first tokens and the recent ones alone.

DuoAttention (Xiao et al., arXiv 2410.10819) trains a gate for each key head (`duo_gates`). This is the direct
measurement, without training and without an attention matrix. Each layer computes its attention a second time, with a
window and first tokens, of the same queries, keys and values. From z and z' follows the relative change
||z' - z|| / ||z||, and from the logarithms of the two normalisers the weight outside, 1 - exp(lse' - lse), exactly.

Rows count that see a key outside of what is kept. Shapes: B sequences, L layers, H heads, K key heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from attnlab_kernels import Emit
from torch import Tensor

from attnlab.capture.call import Site
from attnlab.capture.intervention import Outcome, PatternEdit, Solver, Variant
from attnlab.capture.merge import is_empty
from attnlab.capture.session import capture
from attnlab.errors import AttnlabError
from attnlab.experiments import Context, Experiment
from attnlab.interventions import Streaming
from attnlab.options import check_number, check_whole
from attnlab.plots import head_map
from attnlab.results import Metric, NamedArray, Result, heads_frame
from attnlab_analyses.duo import Sizes, fitted, key_heads, write_full_attention_heads
from attnlab_analyses.moments import HeadMoments
from attnlab_analyses.sentences import heads_named

if TYPE_CHECKING:
    from attnlab.models import Model

METRICS = {
    "streaming_change": Metric(
        "Change by streaming", "", "relative change of z where the first and the recent tokens alone are seen", 0.0, 1.0
    ),
    "outside_mass": Metric(
        "Weight outside", "", "mean over query rows, beyond the first and the recent tokens", 0.0, 1.0
    ),
    "outside_rows": Metric("Rows that look outside", "", "share of query rows with more weight than allowed", 0.0, 1.0),
}
_SMALL = 0.1
_TOLD = 8


@dataclass(frozen=True)
class StreamingHeads(Experiment):
    """Which heads would stay the same if they kept the first and the recent tokens alone.

    A head is a streaming head here when no row of any sequence (or at most the share `rows` of them) puts more than
    `threshold` of its weight outside. `full_attention_heads.tsv` holds for each key head the largest
    `streaming_change` of its query heads, at most 1: the more is lost, the nearer to full attention.

    Attributes:
        sink, recent: how many first and recent tokens are kept. Where together they are more than half of the longest
            sequence, both are made smaller by one factor.
        threshold: weight of a row that may lie outside.
        rows: share of the rows that may have more.

    Example:
        >>> import attnlab
        >>> text = "A rose is a rose, said the rose, and who would say it is not a rose? " * 3
        >>> found = attnlab.experiment("known-circuit", StreamingHeads(sink=4, recent=64), [text])
        >>> kept = found.table[found.table["streaming"]]["name"]
        >>> "L0H0" in kept.tolist(), "L1H5" in kept.tolist()  # the previous-token head, and a broad one
        (True, False)
    """

    name: ClassVar[str] = "streaming"
    summary: ClassVar[str] = "streaming heads: what each loses when it sees first and recent tokens alone"

    sink: int = 64
    recent: int = 256
    threshold: float = 0.1
    rows: float = 0.0

    def __post_init__(self) -> None:
        check_whole("sink", self.sink, 0)
        check_whole("recent", self.recent, 1)
        check_number("threshold", self.threshold, 0, 1)
        check_number("rows", self.rows, 0, 1)

    def refusal(self, model: Model) -> str | None:
        """Cross-attention has no recent tokens."""
        return None if "self" in model.layout.heads else "it has no self-attention, of which heads are measured."

    def run(self, context: Context) -> Result:
        """Measures every head on the data."""
        model, sequences = context.model, context.sequences
        assert sequences is not None
        sizes = fitted(Sizes(self.sink, self.recent), max(sequences.lengths), 0.5)
        heads = model.layout.heads["self"]
        moments = {metric: HeadMoments(heads) for metric in METRICS}
        done = 0
        for number, batch in enumerate(context.batches()):
            context.say("sequences", done, len(sequences))

            def compute(batch: object = batch) -> dict[str, Tensor]:
                watch = _Watch("all", sizes, self.threshold)
                with torch.no_grad(), capture(model, interventions=[watch]):
                    model.forward(batch)  # type: ignore[arg-type]
                return watch.measured()

            found = context.step(f"batch-{number:05d}", compute)
            for layer in range(len(heads)):
                for metric, values in moments.items():
                    values.add(layer, found[f"{layer}.{metric}"])
            done += len(batch.index)
        if not bool((moments["outside_mass"].count > 0).any()):
            raise AttnlabError(f"No row sees a key outside of {sizes}; give longer sequences or smaller sizes.")
        return self._result(model, moments, sizes)

    def _result(self, model: Model, moments: Mapping[str, HeadMoments], sizes: Sizes) -> Result:
        heads, keys = model.layout.heads["self"], key_heads(model)
        named = heads_named(heads)
        frame = heads_frame(
            (i, j, "self", metric, float(m.mean[i, j]), float(m.stderr()[i, j]), int(m.count[i, j]))
            for metric, m in moments.items()
            for i, j in named
            if m.count[i, j] > 0
        )
        # A layer whose own window lies inside of what is kept has no such row, and its moments are 0: nothing is lost.
        change, share = moments["streaming_change"].mean, moments["outside_rows"].mean
        rows = [
            {
                "layer": i, "head": j, "name": name, "key_head": j * keys[i] // heads[i],
                "streaming": bool(share[i, j] <= self.rows), **{m: float(moments[m].mean[i, j]) for m in METRICS},
            }
            for (i, j), name in named.items()
        ]  # fmt: skip
        by_key = np.full((len(keys), max(keys)), np.nan)
        for i, n in enumerate(keys):
            by_key[i, :n] = change[i, : heads[i]].view(n, -1).amax(1).clamp(0, 1).numpy()
        about = "Largest streaming_change of the query heads that share a key head, at most 1."
        arrays = {
            "full_attention": NamedArray(by_key, ("layer", "key_head"), {}, "", about),
            "sizes": NamedArray(np.array(sizes), ("size",), {"size": list(sizes._fields)}, "tokens", "What was kept."),
        }
        found = self._findings(rows, sizes)
        return Result(self.name, found, frame, pd.DataFrame(rows), arrays, metrics=METRICS)

    def _findings(self, rows: list[dict[str, object]], sizes: Sizes) -> tuple[str, ...]:
        holders = [row for row in rows if row["streaming"]]
        names = ", ".join(str(row["name"]) for row in holders[:_TOLD])
        more = f" and {len(holders) - _TOLD} more" if len(holders) > _TOLD else ""
        allowed = "no row" if self.rows == 0 else f"at most {self.rows:.1%} of the rows"
        kept = sum(float(row["streaming_change"]) <= _SMALL for row in rows)  # type: ignore[arg-type]
        most = max(rows, key=lambda row: float(row["streaming_change"]))  # type: ignore[arg-type]
        return (
            f"{len(holders)} of {len(rows)} heads are streaming heads{': ' if holders else ''}{names}{more}; "
            f"{allowed} of theirs put more than {self.threshold:g} of its weight outside {sizes}.",
            f"Restricted to these, {kept} heads change their output by at most {_SMALL:.0%}; the one that changes most "
            f"is {most['name']}, by {most['streaming_change']:.0%}.",
        )

    def write(self, result: Result, folder: Path) -> list[Path]:
        """DuoAttention's files; none where layers differ in their number of key heads."""
        values = result.arrays["full_attention"].values
        if np.isnan(values).any():
            return []
        sizes = Sizes(*(int(n) for n in result.arrays["sizes"].values))
        return write_full_attention_heads(folder, values, sizes)

    @classmethod
    def figures(cls, result: Result) -> dict[str, go.Figure]:
        """The maps of the change and of the weight outside."""
        return {metric: head_map(result, metric) for metric in METRICS}


@dataclass(frozen=True, eq=False)
class _Watch(PatternEdit):
    """Changes nothing, and measures what a restriction would change."""

    sizes: Sizes
    threshold: float
    found: dict[str, Tensor] = field(default_factory=dict)

    stage = 2

    def edit(self, solver: Solver, site: Site, heads: tuple[int, ...], backend: str) -> Iterable[Variant]:
        restricted = Streaming("all", first_tokens=self.sizes.sink, window=self.sizes.recent)
        near = next(iter(restricted.edit(solver, site, heads, backend))).solver
        emit = Emit(lse=True, visible=True)
        whole, part = (which.solve(emit, site.query_mask, backend) for which in (solver, near))
        self._measure(whole, part, site)
        return [Variant(None, _Solved(solver, whole))]

    def _measure(self, whole: Outcome, part: Outcome, site: Site) -> None:
        seen, left = whole.emitted, part.emitted
        assert seen.visible is not None
        assert left.visible is not None
        assert seen.lse is not None
        assert left.lse is not None
        counts = seen.visible > left.visible
        if site.query_mask is not None:
            counts = counts & site.query_mask[:, None]
        # A row may see nothing of what is kept; a normaliser of -inf beside a finite one says so.
        outside = torch.where(counts, -torch.expm1(left.lse - seen.lse), 0.0).clamp(0, 1).double()
        number = counts.sum(-1).double()
        wide = torch.promote_types(whole.z.dtype, torch.float32)
        moved, size = (
            torch.where(counts[..., None], z.to(wide), 0.0).double().square().sum((-1, -2))
            for z in (part.z.to(wide) - whole.z.to(wide), whole.z)
        )
        values = {
            "outside_mass": outside.sum(-1) / number,
            "outside_rows": (outside > self.threshold).sum(-1) / number,
            "streaming_change": torch.where(number > 0, (moved / size.clamp(min=1e-300)).sqrt(), torch.nan),
        }
        self.found.update({f"{site.layer}.{metric}": value.cpu() for metric, value in values.items()})

    def measured(self) -> dict[str, Tensor]:
        """[B, H] by layer and metric."""
        return dict(self.found)


@dataclass(frozen=True, eq=False)
class _Solved(Solver):
    """A problem whose output is known already."""

    inner: Solver
    outcome: Outcome

    def solve(self, emit: Emit | None, query_mask: Tensor | None, backend: str) -> Outcome:
        if emit is None or is_empty(emit):
            return self.outcome
        return self.inner.solve(emit, query_mask, backend)

"""`attnlab.compare`: the differences of two runs as a table, sentences, figures and a page.

Every difference is B - A. What is marked stands after Benjamini and Hochberg's correction over all rows of the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from attnlab.compare.bootstrap import bootstrap_differences, least_p
from attnlab.compare.correction import benjamini_hochberg
from attnlab.compare.match import Pair, match_runs
from attnlab.errors import AttnlabError
from attnlab.plots.metrics import KINDS, describe, with_unit
from attnlab.results.metric import Metric
from attnlab.runs.run import Run, load_run

if TYPE_CHECKING:
    import plotly.graph_objects as go

FEW = 20
"""Below this many sequences percentile intervals are noticeably too narrow (docs/comparing-runs.md has figures)."""
_TOLD = 6
COLUMNS = (
    "layer", "head", "kind", "metric", "value_a", "value_b", "difference", "low", "high", "n_a", "n_b", "paired", "p",
    "adjusted_p", "significant",
)  # fmt: skip


class Settings(NamedTuple):
    """How the intervals were made."""

    confidence: float
    resamples: int
    seed: int


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `attnlab.compare` gives back.

    Attributes:
        table: one row for each head and metric that both runs have, sorted by metric, kind, layer and head: value_a,
            value_b, difference (B - A), low and high (the interval), n_a and n_b (sequences), paired, p, adjusted_p
            (Benjamini-Hochberg over the table), significant (adjusted_p at most 1 - confidence).
        a, b: the runs.
        notes: what was left out, and what to keep in mind.
        settings: confidence, resamples, seed.
    """

    table: pd.DataFrame
    a: Run
    b: Run
    notes: tuple[str, ...]
    settings: Settings

    @cached_property
    def metrics(self) -> Mapping[str, Metric]:
        """What the metrics are called and in which unit they are, as the runs say, by name."""
        return {**self.b.metrics, **self.a.metrics}

    @property
    def findings(self) -> tuple[str, ...]:
        """How many differences stand, and the largest one of the metrics with most of them, in plain sentences."""
        stand, rows = int(self.table["significant"].sum()), len(self.table)
        rate = f"{100 * (1 - self.settings.confidence):.3g} %"
        first = (
            f"{stand:,} of {rows:,} differences stand after Benjamini-Hochberg's correction for their number (at most "
            f"{rate} of those that stand are expected to be false)."
            if stand
            else f"None of {rows:,} differences stands after Benjamini-Hochberg's correction for their number, "
            f"at {rate}, which is no evidence that the runs are equal: the intervals say how far apart they may be."
        )
        largest = [
            f"{about.title} ({KINDS.get(row.kind, row.kind)}): {row.stands} of {row.heads} heads; the largest is "
            f"L{row.layer}H{row.head}, {_told(row, about.unit)}."
            for row in _records(self.largest(1).sort_values("stands", ascending=False, kind="stable"))
            for about in (describe(row.metric, self.metrics),)
            if row.significant
        ]
        more = [f"Heads differ in {len(largest) - _TOLD} more metrics."] if len(largest) > _TOLD + 1 else []
        return first, *(largest[:_TOLD] if more else largest), *more

    def largest(self, most: int = 3) -> pd.DataFrame:
        """The `most` largest differences of each metric and kind, those that stand first.

        The columns of `table`, and `stands` and `heads`: how many of the kind's heads stand, and how many there are.
        """
        parts = []
        for _, rows in self.table.groupby(["metric", "kind"], sort=False):
            order = rows.assign(size=rows["difference"].abs()).sort_values(
                ["significant", "size"], ascending=False, kind="stable"
            )
            stands = int(rows["significant"].sum())
            parts.append(order.drop(columns="size").head(most).assign(stands=stands, heads=len(rows)))
        return pd.concat(parts, ignore_index=True)

    def figures(self) -> dict[str, go.Figure]:
        """For each metric and kind by `metric` (`metric, kind` beyond self-attention) a map and A against B."""
        from attnlab.compare.figures import comparison_figures

        return comparison_figures(self)

    def plot(self, name: str | None = None) -> go.Figure:
        """One of `figures`, that of the metric most of whose heads differ unless named; it is returned, not shown.

        Raises:
            AttnlabError: there is no such figure; the message lists the names.
        """
        figures = self.figures()
        if name is None:
            return next(iter(figures.values()))
        if name not in figures:
            raise AttnlabError(f"This comparison has no figure {name!r}. There are: {'; '.join(figures)}.")
        return figures[name]

    def save(self, folder: str | Path) -> Path:
        """Writes `compare.html` (one file, opens offline) and `tables/compare.parquet`; the page's path.

        Raises:
            RunFolderError: the folder is a run's, or cannot be written.
        """
        from attnlab.compare.page import save_comparison

        return save_comparison(self, Path(folder))

    def __repr__(self) -> str:
        return f"Comparison({self.a!r}, {self.b!r}, {len(self.table)} differences)"


def _records(frame: pd.DataFrame) -> list[Any]:
    return list(frame.itertuples(index=False))


def _told(row: Any, unit: str) -> str:
    change = with_unit(f"{row.difference:+.3g}", unit)
    return f"{row.value_a:.3g} in A and {row.value_b:.3g} in B, {change} ({row.low:+.3g} to {row.high:+.3g})"


def compare(
    run_a: Run | str | Path,
    run_b: Run | str | Path,
    *,
    metrics: Sequence[str] | None = None,
    kinds: Sequence[str] | None = None,
    paired: bool | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compares every head metric of two runs, with intervals by bootstrap over sequences.

    Args:
        run_a, run_b: runs, or their folders.
        metrics: only these; all that both have when None.
        kinds: only these kinds of attention (self, encoder, cross).
        paired: whether sequence i of A's data belongs to sequence i of B's, such as one text at two lengths. None pairs
            them where both runs read the very same tokens.
        confidence: of the intervals; 1 - confidence is the share of false ones among the differences marked.
        resamples: of the bootstrap, 100 at least.
        seed: of the draws.

    Raises:
        RunFolderError: a folder does not exist or holds no finished run.
        AttnlabError: a run keeps no values of single sequences, nothing is in common, or an argument is out of range.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> texts = [[1, 2, 3, 4], [4, 5, 1], [7, 2, 9]]
        >>> models = [GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=10)) for _ in range(2)]
        >>> import attnlab
        >>> found = attnlab.compare(*(attnlab.analyze(m, texts, analyses=["entropy"]) for m in models))
        >>> found.table.query("metric == 'entropy'")[["layer", "head", "n_a", "paired"]].values.tolist()
        [[0, 0, 3, True], [0, 1, 3, True]]
    """
    _check(confidence, resamples, seed)
    a, b = (run if isinstance(run, Run) else load_run(run) for run in (run_a, run_b))
    settings = Settings(confidence, resamples, seed)
    pairs, notes = match_runs(a, b, metrics, kinds)
    table = pd.concat([_rows(pair, _pairing(pair, paired), settings) for pair in pairs], ignore_index=True)
    table = table[(table["n_a"] > 0) & (table["n_b"] > 0)].reset_index(drop=True)
    if table.empty:
        raise AttnlabError("The two runs have no sequence in common in which a head metric has a value.")
    table["adjusted_p"] = benjamini_hochberg(table["p"].to_numpy())
    table["significant"] = table["adjusted_p"] <= (1 - confidence) * (1 + 1e-9)
    notes = [*_about_pairing(table, pairs, paired), *notes, *_about_numbers(table, settings)]
    return Comparison(table.loc[:, list(COLUMNS)], a, b, tuple(notes), settings)


def _check(confidence: float, resamples: int, seed: int) -> None:
    if not isinstance(confidence, int | float) or not 0.5 <= confidence < 1:
        raise AttnlabError(f"The confidence is {confidence!r}; a share from 0.5 to below 1 was expected, such as 0.95.")
    if not isinstance(resamples, int) or resamples < 100:
        raise AttnlabError(f"The number of resamples is {resamples!r}; 100 at least, please.")
    if not isinstance(seed, int) or seed < 0:
        raise AttnlabError(f"The seed is {seed!r}; a whole number, 0 or larger, was expected.")


def _pairing(pair: Pair, paired: bool | None) -> bool:
    if pair.own and paired is not False:
        # What a user knows to belong together are the sequences of the data.
        return pair.same
    if paired and len(pair.a) != len(pair.b):
        raise AttnlabError(
            f"Sequences cannot be paired: A has {len(pair.a):,} and B {len(pair.b):,} for the metric {pair.metric}. "
            "Leave the pairing to attnlab (paired=None), or read as many sequences in both."
        )
    return pair.same if paired is None else paired


def _rows(pair: Pair, paired: bool, settings: Settings) -> pd.DataFrame:
    found = bootstrap_differences(pair.a, pair.b, paired=paired, **settings._asdict())
    return pd.DataFrame(
        {"layer": pair.heads[:, 0], "head": pair.heads[:, 1], "kind": pair.kind, "metric": pair.metric}
        | found._asdict()
        | {"paired": paired}
    ).astype({"kind": "str", "metric": "str"})


def _about_pairing(table: pd.DataFrame, pairs: list[Pair], asked: bool | None) -> list[str]:
    if table["paired"].all():
        why = "both runs read the same ones" if all(pair.same for pair in pairs) else "as was asked"
        return [f"Sequences are paired, {why}: what a sequence does to both runs alike cancels."]
    if table["paired"].any():
        metrics = sorted(set(table.loc[table["paired"], "metric"]))
        return [f"Sequences are paired for {', '.join(metrics)}; for the rest each run's are resampled on their own."]
    why = "since the runs read different tokens" if asked is None else "as was asked"
    return [f"Each run's sequences are resampled on their own, {why}."]


def _about_numbers(table: pd.DataFrame, settings: Settings) -> list[str]:
    notes = []
    untested = int(table["p"].isna().sum())
    if untested:
        notes.append(f"{untested:,} differences rest on a single sequence in a run and have no interval.")
    fewest = _records(table.assign(n=table[["n_a", "n_b"]].min(axis=1)).nsmallest(1, "n"))[0]
    if fewest.n < FEW:
        least = least_p(fewest.n_a, fewest.n_b, paired=fewest.paired)
        notes.append(
            f"Some means are over {fewest.n} sequence{'' if fewest.n == 1 else 's'}: below {FEW} the intervals are too "
            f"narrow, and from so few no p-value can be below {least:.2g}."
        )
    finest, tested = 1 / (settings.resamples + 1), int(table["p"].notna().sum())
    if ((table["p"] <= finest * (1 + 1e-9)) & ~table["significant"]).any():
        enough = int(np.ceil(tested / (1 - settings.confidence) / 100)) * 100
        notes.append(
            f"{settings.resamples:,} resamples cannot tell p-values below {finest:.2g} apart, too coarse for a few "
            f"differences among {tested:,} comparisons: ask for {enough:,} resamples, or for fewer metrics."
        )
    return notes

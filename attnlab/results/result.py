"""Results: what an analysis found, with named axes, tidy rows and plain sentences."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd

from attnlab.results.metric import Metric

if TYPE_CHECKING:
    import plotly.graph_objects as go

HEADS_COLUMNS = ("layer", "head", "kind", "metric", "value", "stderr", "n")


@dataclass(frozen=True, eq=False)
class NamedArray:
    """An array whose axes have names and, where it makes sense, coordinates.

    Attributes:
        values: the numbers.
        axes: one name for each axis, for example `("layer", "head", "bin")`.
        coordinates: labels along an axis (layer numbers, bin edges, tokens), by axis name. Edges of bins are one more
            than the axis is long.
        unit: for example `nats`, `probability`.
        description: one sentence.
    """

    values: np.ndarray
    axes: tuple[str, ...]
    coordinates: Mapping[str, list] = field(default_factory=dict)
    unit: str = ""
    description: str = ""

    def __post_init__(self) -> None:
        if len(self.axes) != self.values.ndim:
            raise ValueError(f"An array of shape {self.values.shape} has the axes {self.axes}: one name each, please.")
        for axis, labels in self.coordinates.items():
            if axis not in self.axes:
                raise ValueError(f"Coordinates are given for {axis!r}, which is none of the axes {self.axes}.")
            length = self.values.shape[self.axes.index(axis)]
            if len(labels) not in (length, length + 1):
                raise ValueError(
                    f"The axis {axis!r} has {length} places and {len(labels)} coordinates; "
                    "as many were expected, or one more for edges of bins."
                )


@dataclass(frozen=True, eq=False)
class Result:
    """What one analysis found.

    Attributes:
        analysis: name of the analysis.
        findings: plain sentences for the reader, the most important first.
        heads: tidy rows with the columns layer, head, kind, metric, value, stderr, n; no two analyses share a metric.
        table: the analysis' own table (any columns).
        arrays: named arrays.
        more_tables: further tables by name, of lower-case letters and underscores.
        metrics: title, unit and range of the metrics in `heads`, by name, in the order in which a report offers them;
            one that is left out goes by its name.

    >>> heads = heads_frame([(0, 0, "self", "entropy", 1.25, 0.5, 4)])
    >>> metrics = {"entropy": Metric("Attention entropy", "nats")}
    >>> result = Result("entropy", ("One head.",), heads, pd.DataFrame({"layer": [0]}), {}, metrics=metrics)
    >>> result.to_frame()["value"].tolist()
    [1.25]
    """

    analysis: str
    findings: tuple[str, ...]
    heads: pd.DataFrame
    table: pd.DataFrame
    arrays: Mapping[str, NamedArray]
    more_tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    metrics: Mapping[str, Metric] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.more_tables:
            if not re.fullmatch("[a-z_]+", name):
                raise ValueError(
                    f"A further table of {self.analysis} is called {name!r}; lower-case letters and underscores were "
                    "expected, since files are named after it."
                )
        for name, about in self.metrics.items():
            if not isinstance(about, Metric):
                raise ValueError(
                    f"The metric {name!r} of {self.analysis} is declared as {about!r}; an attnlab.results.Metric was "
                    "expected."
                )

    def to_frame(self) -> pd.DataFrame:
        """The tidy rows, one for each layer, head, kind and metric (a copy)."""
        return self.heads.copy()

    def figures(self) -> dict[str, go.Figure]:
        """All plots by name, the most telling first: the analysis' own, or head maps where it is not installed."""
        from attnlab.plots.of_result import figures_of

        return figures_of(self)

    def plot(self, name: str | None = None) -> go.Figure:
        """One plot, the most telling one unless a name is given; it is returned, not shown.

        Raises:
            AttnlabError: there is no such plot; the message lists the names.
        """
        from attnlab.plots.of_result import figure_of

        return figure_of(self, name)

    def save(self, directory: str | Path) -> None:
        """Writes `tables/<analysis>.parquet`, `arrays/<analysis>.safetensors` and this result's rows of
        `tables/heads.parquet`, each file whole or not at all; the same result gives the same bytes. Further tables go
        to `tables/<analysis>.<name>.parquet`.

        Raises:
            RunFolderError: the folder cannot be written.
        """
        from attnlab.results.storage import save_result

        save_result(self, Path(directory))

    @classmethod
    def load(cls, directory: str | Path, analysis: str) -> Self:
        """Reads what `save` or a run wrote.

        Raises:
            RunFolderError: the folder holds no such result, or its files are damaged.
        """
        from attnlab.results.storage import read_result

        return cls(**read_result(Path(directory), analysis))


def heads_frame(rows: Iterable[tuple[Any, ...]]) -> pd.DataFrame:
    """Tidy rows (layer, head, kind, metric, value, stderr, n) as a frame with fixed column types.

    >>> heads_frame([(0, 1, "self", "entropy", 1.5, float("nan"), 1)]).dtypes["n"]
    dtype('int64')
    """
    frame = pd.DataFrame(list(rows), columns=list(HEADS_COLUMNS))
    types = dict.fromkeys(("layer", "head", "n"), "int64") | dict.fromkeys(("value", "stderr"), "float64")
    types |= dict.fromkeys(("kind", "metric"), "str")
    return frame.astype(types)


def combine_heads(results: Iterable[Result]) -> pd.DataFrame:
    """The rows of all results in one table, sorted by metric, kind, layer and head."""
    return sort_heads([result.heads for result in results])


def sort_heads(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Several tables of tidy rows as one, in the order that a run's table has: metric, kind, layer, head."""
    present = [frame.loc[:, list(HEADS_COLUMNS)] for frame in frames if len(frame)]
    if not present:
        return heads_frame([])
    whole = pd.concat(present, ignore_index=True)
    return whole.sort_values(["metric", "kind", "layer", "head"], kind="stable", ignore_index=True)

"""The figures of a comparison: for each metric the map of differences, and B against A, one point for each head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from attnlab.plots.metrics import KINDS, as_text, by_number, describe, with_unit
from attnlab.plots.template import DIVERGING, PALETTE, blank, colour_bar
from attnlab.results.metric import Metric

if TYPE_CHECKING:
    from attnlab.compare.comparison import Comparison

_STANDS, _REST = PALETTE[4], "#9aa4af"
_LEFT, _RIGHT = (0.0, 0.4), (0.6, 1.0)
"""Shares of the width: the map with its colour bar, and the scatter plot."""


def comparison_figures(comparison: Comparison) -> dict[str, go.Figure]:
    """A figure for each metric and kind by its name, those first of which the largest share of heads stands."""
    groups = [
        (str(metric), kind, rows) for (metric, kind), rows in comparison.table.groupby(["metric", "kind"], sort=False)
    ]
    groups.sort(key=lambda group: (-group[2]["significant"].mean(), by_number(group[0])))
    confidence = comparison.settings.confidence
    return {
        metric if kind == "self" else f"{metric}, {kind}": comparison_figure(
            rows, confidence, describe(metric, comparison.metrics)
        )
        for metric, kind, rows in groups
    }


def comparison_figure(rows: pd.DataFrame, confidence: float = 0.95, about: Metric | None = None) -> go.Figure:
    """Differences of one metric and kind as a map, and the values of B against those of A.

    Args:
        rows: those of the table of a comparison that have this metric and kind.
        confidence: of the intervals in them.
        about: what the metric is called; it goes by its name without.
    """
    metric, kind = rows.iloc[0][["metric", "kind"]]
    about = as_text(about or describe(metric))
    unit = f"({about.unit})" if about.unit else ""
    figure = blank(
        f"{about.title}: B - A",
        f"{with_unit(KINDS.get(kind, str(kind)), unit)}; marked heads stand after the correction",
    )
    shape = (int(rows["layer"].max()) + 1, int(rows["head"].max()) + 1)
    figure.add_trace(_map(rows, shape, about.unit, confidence))
    marked = rows[rows["significant"]]
    figure.add_trace(
        go.Scatter(
            x=marked["head"], y=marked["layer"], mode="markers", hoverinfo="skip", showlegend=False,
            marker={"size": 6, "color": "#24292f", "line": {"width": 1, "color": "#ffffff"}},
        )
    )  # fmt: skip
    ends = np.nanmin(rows[["value_a", "value_b"]]), np.nanmax(rows[["value_a", "value_b"]])
    figure.add_trace(
        go.Scatter(
            x=ends, y=ends, mode="lines", hoverinfo="skip", xaxis="x2", yaxis="y2", showlegend=False,
            line={"width": 1, "dash": "dash", "color": "rgba(128,128,128,0.7)"},
        )
    )  # fmt: skip
    for stands, name, colour in ((False, "does not stand", _REST), (True, "stands", _STANDS)):
        some = rows[rows["significant"] == stands]
        figure.add_trace(
            go.Scatter(
                x=some["value_a"], y=some["value_b"], mode="markers", name=name, xaxis="x2", yaxis="y2",
                marker={"size": 8, "color": colour, "opacity": 0.85, "line": {"width": 0.5, "color": "#ffffff"}},
                customdata=_hover(some, about.unit, confidence), hovertemplate="%{customdata}<extra></extra>",
            )
        )  # fmt: skip
    layers, heads = shape
    figure.update_layout(
        height=int(np.clip(26 * layers + 190, 380, 900)),
        xaxis={"domain": _LEFT, "title": "head", "showgrid": False, "tick0": 0, "dtick": -(-heads // 12)},
        yaxis={"autorange": "reversed", "title": "layer", "showgrid": False, "tick0": 0, "dtick": -(-layers // 16)},
        xaxis2={"domain": _RIGHT, "anchor": "y2", "title": with_unit("A", unit)},
        yaxis2={"anchor": "x2", "title": with_unit("B", unit)},
        legend={"orientation": "h", "x": _RIGHT[0], "xanchor": "left", "y": 1.0, "yanchor": "bottom"},
        margin={"t": 96},
    )
    return figure


def _map(rows: pd.DataFrame, shape: tuple[int, int], unit: str, confidence: float) -> go.Heatmap:
    place = (rows["layer"].to_numpy(), rows["head"].to_numpy())
    values = np.full(shape, np.nan)
    hover = np.full(shape, "not in both runs", dtype=object)
    values[place] = rows["difference"]
    hover[place] = _hover(rows, unit, confidence)
    reach = float(np.nanmax(abs(values))) or 1.0
    return go.Heatmap(
        z=values, customdata=hover, hovertemplate="%{customdata}<extra></extra>", xgap=1.5, ygap=1.5,
        colorscale=DIVERGING, reversescale=True, zmin=-reach, zmax=reach,
        colorbar=colour_bar(unit, x=_LEFT[1] + 0.01, xanchor="left"),
    )  # fmt: skip


def _hover(rows: pd.DataFrame, unit: str, confidence: float) -> np.ndarray:
    found = np.empty(len(rows), dtype=object)
    listed: list[Any] = list(rows.itertuples())
    for place, row in enumerate(listed):
        interval = "no interval" if np.isnan(row.low) else f"{100 * confidence:g} %: {row.low:+.3g} to {row.high:+.3g}"
        sequences = f"{row.n_a:,} paired sequences" if row.paired else f"{row.n_a:,} and {row.n_b:,} sequences"
        found[place] = (
            f"<b>L{row.layer}H{row.head}</b> {with_unit(f'{row.difference:+.4g}', unit)}<br>{interval}<br>"
            f"A {row.value_a:.4g}, B {row.value_b:.4g}<br>{sequences}<br>"
            f"{'stands' if row.significant else 'does not stand'} after the correction"
        )
    return found

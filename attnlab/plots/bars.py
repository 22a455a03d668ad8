"""Horizontal bars for the few largest of something: the first is on top."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from attnlab.plots.template import PALETTE, blank


def top_bars(
    labels: Sequence[str],
    values: Sequence[float],
    title: str,
    subtitle: str,
    *,
    unit: str = "",
    hover: Sequence[str] | None = None,
    mark: float | None = None,
) -> go.Figure:
    """Bars, the first on top, with a dashed line at `mark`. Labels and hover text are HTML to Plotly: escape them.

    >>> top_bars(["L1H0", "L0H3"], [0.9, 0.4], "Heads", "mass on the first token").data[0].y
    ('L1H0', 'L0H3')
    """
    figure = blank(title, subtitle, height=max(240, 24 * len(labels) + 140))
    figure.add_trace(
        go.Bar(
            y=list(labels),
            x=list(values),
            orientation="h",
            marker={"color": PALETTE[0], "line": {"width": 0}},
            customdata=list(hover) if hover is not None else [""] * len(labels),
            hovertemplate="<b>%{y}</b><br>%{x:.4g} " + unit + "<br>%{customdata}<extra></extra>",
            texttemplate="%{x:.3g}",
            textposition="outside",
            cliponaxis=False,
        )
    )
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category")
    figure.update_xaxes(title=unit or None, rangemode="tozero")
    figure.update_layout(bargap=0.25, margin={"r": 56})
    if mark is not None:
        figure.add_vline(x=mark, line={"dash": "dash", "width": 1.2, "color": PALETTE[4]})
    return figure

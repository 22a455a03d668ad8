"""One look for every figure: quiet axes, colours that colour-blind readers tell apart, transparent background.

Lines take the palette of Okabe and Ito ("Color universal design", 2008); maps take a scale of even lightness (Viridis),
or a diverging one where values have both signs.
"""

from __future__ import annotations

import plotly.graph_objects as go

MENU_MARGIN = 112
"""Top margin, in pixels, of a figure with a drop-down: title, subtitle, then the drop-down on a line of its own."""
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#7A7A7A", "#B8A100")
SEQUENTIAL = "Viridis"
DIVERGING = "RdBu"
FONT = "Inter, system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
GRID = "rgba(128,128,128,0.18)"
_AXIS = {
    "gridcolor": GRID,
    "zeroline": False,
    "linecolor": "rgba(128,128,128,0.45)",
    "ticks": "outside",
    "ticklen": 4,
    "tickcolor": "rgba(128,128,128,0.45)",
    "automargin": True,
    "title": {"standoff": 10, "font": {"size": 12.5}},
}
TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": FONT, "size": 12.5, "color": "#24292f"},
        "title": {
            "font": {"size": 16},
            "x": 0.0,
            "xanchor": "left",
            "xref": "container",
            "y": 1.0,
            "yanchor": "top",
            "yref": "container",
            "pad": {"l": 12, "t": 12},
        },
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": list(PALETTE),
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "hoverlabel": {"font": {"family": FONT, "size": 12.5}, "align": "left"},
        "legend": {"orientation": "v", "font": {"size": 11.5}},
        "margin": {"l": 64, "r": 24, "t": 72, "b": 56},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "rgba(128,128,128,0.6)", "activecolor": "#0072B2"},
    }
)


def blank(title: str, subtitle: str = "", *, height: int = 420) -> go.Figure:
    """An empty figure in the house look; the subtitle says what is plotted and in which unit."""
    figure = go.Figure()
    figure.update_layout(
        template=TEMPLATE,
        height=height,
        title={"text": title, "subtitle": {"text": subtitle, "font": {"size": 12, "color": "#7a828c"}}},
    )
    return figure


def colour_bar(title: str = "", **more: object) -> dict[str, object]:
    """A slim colour bar with its unit on top."""
    bar: dict[str, object] = {
        "title": {"text": title, "side": "top", "font": {"size": 11.5}},
        "thickness": 12,
        "outlinewidth": 0,
        "ticklen": 3,
        "tickfont": {"size": 11},
    }
    return bar | more


def choices(labels: list[str], arguments: list[list[dict[str, object]]], *, x: float = 1.0) -> dict[str, object]:
    """A drop-down above the plot's right corner that applies `arguments[i]` (Plotly's `update`) on choosing label i."""
    return {
        "type": "dropdown",
        "direction": "down",
        "x": x,
        "xanchor": "right",
        "y": 1.0,
        "yanchor": "bottom",
        "pad": {"t": 0, "b": 6},
        "bgcolor": "rgba(250,250,250,0.95)",
        "bordercolor": "rgba(128,128,128,0.4)",
        "font": {"size": 12, "color": "#24292f"},
        "showactive": True,
        "buttons": [
            {"label": label, "method": "update", "args": argument}
            for label, argument in zip(labels, arguments, strict=True)
        ],
    }

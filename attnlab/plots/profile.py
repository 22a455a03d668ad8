"""A statistic against position, for each layer, and for each head of a layer chosen from a drop-down."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from attnlab.plots.template import MENU_MARGIN, blank, choices

HEIGHT = 460
"""In pixels; what stands beside a profile is no lower."""
MOST_HEADS = 400
"""Models with more heads than this get lines for layers only: each line of a head weighs on the page."""
_LAYERS = ["#5b6bd6", "#1b9aaa", "#58a63c", "#dd9a00"]
"""From the first layer to the last; all of a lightness that shows on white and on black."""


def profile(
    values: np.ndarray,
    edges: list[int],
    title: str,
    subtitle: str,
    *,
    unit: str = "",
    weights: np.ndarray | None = None,
    first: int = 0,
) -> go.Figure:
    """Lines over logarithmic bins of position.

    Args:
        values: [layers, heads, bins] means, NaN where there is none.
        edges: bins + 1 positions; bin p holds positions from edges[p] to edges[p+1] - 1.
        title, subtitle: of the figure.
        unit: of the values.
        weights: [layers, heads, bins], for the layers' means; equal without.
        first: what the first position is called, 0 or 1.

    >>> profile(np.ones((2, 3, 2)), [0, 1, 4], "Entropy", "by position").data[0].y.tolist()
    [1.0, 1.0]
    """
    layers, heads, _ = values.shape
    seen = np.isfinite(values).any(axis=(0, 1))
    bins = np.flatnonzero(seen)
    x, names = _places(edges, bins, first)
    figure = blank(title, subtitle, height=HEIGHT)
    from plotly.colors import sample_colorscale

    tints = sample_colorscale(_LAYERS, np.linspace(0.0, 1.0, max(layers, 2)).tolist())
    hover = f"<b>%{{fullData.name}}</b>, position %{{customdata}}<br>%{{y:.4g}} {unit}<extra></extra>"

    def line(y: np.ndarray, name: str, colour: str | None, visible: bool) -> None:
        style = {"width": 2} if colour is None else {"width": 2, "color": colour}
        mode = "lines+markers" if len(bins) < 20 else "lines"
        figure.add_trace(
            go.Scatter(
                x=x, y=y, name=name, customdata=names, mode=mode, line=style, marker={"size": 5},
                hovertemplate=hover, visible=visible,
            )
        )  # fmt: skip

    for layer in range(layers):
        line(layer_means(values, weights)[layer, bins], f"layer {layer}", tints[layer], True)
    owners = [-1] * layers
    if layers * heads <= MOST_HEADS:
        for layer in range(layers):
            for head in range(heads):
                if np.isfinite(values[layer, head]).any():
                    line(values[layer, head, bins], f"L{layer}H{head}", None, False)
                    owners.append(layer)
        shown = [-1, *range(layers)]
        arguments: list[list[dict[str, object]]] = [[{"visible": [owner == s for owner in owners]}] for s in shown]
        names_of_choices = ["Mean of each layer", *(f"Heads of layer {layer}" for layer in range(layers))]
        figure.update_layout(updatemenus=[choices(names_of_choices, arguments)], margin={"t": MENU_MARGIN})
    figure.update_xaxes(
        title="position in the sequence (log scale)",
        type="log",
        **_ticks(edges[int(bins[-1]) + 1]) if len(bins) else {},
    )
    figure.update_yaxes(title=unit or "value", rangemode="tozero")
    return figure


def layer_means(values: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Means over heads, [layers, bins] from [layers, heads, bins], NaN left out."""
    there = np.isfinite(values)
    weight = there * (1.0 if weights is None else weights)
    total = weight.sum(axis=1)
    sums = (np.where(there, values, 0.0) * weight).sum(axis=1)
    return np.divide(sums, total, out=np.full(total.shape, np.nan), where=total > 0)


def _places(edges: list[int], bins: np.ndarray, first: int) -> tuple[np.ndarray, list[str]]:
    """Where bins stand on a logarithmic axis (position 1 is the first) and what they are called."""
    low = np.array([edges[b] for b in bins], dtype=float)
    high = np.array([edges[b + 1] - 1 for b in bins], dtype=float)
    names = [
        f"{int(a) + first}" if a == b else f"{int(a) + first} to {int(b) + first}"
        for a, b in zip(low, high, strict=True)
    ]
    return np.sqrt((low + 1) * (high + 1)), names


def _ticks(last: int) -> dict[str, list[int]]:
    """1, 2, 5, 10, ... up to `last`."""
    values = [step * 10**power for power in range(len(str(last))) for step in (1, 2, 5)]
    return {"tickvals": [value for value in values if value <= last]}

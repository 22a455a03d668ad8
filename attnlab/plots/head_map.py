"""The layer x head map: one cell for each head, one figure for each metric, a drop-down for the kinds of attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from attnlab.plots.metrics import KINDS, Measured, as_text, describe, with_unit
from attnlab.plots.template import DIVERGING, MENU_MARGIN, SEQUENTIAL, blank, choices, colour_bar
from attnlab.results.metric import Metric


def head_map(heads: Measured | pd.DataFrame, metric: str) -> go.Figure:
    """The layer x head map of one metric.

    Args:
        heads: a result or a run, which say what their metrics are called; or tidy rows with the columns layer, head,
            kind, metric, value, stderr, n, whose metrics go by their names.
        metric: which metric.

    Raises:
        ValueError: the rows hold no such metric.

    >>> from attnlab.results import heads_frame
    >>> rows = heads_frame([(0, 0, "self", "entropy", 1.0, 0.1, 9), (0, 1, "self", "entropy", 2.0, 0.1, 9)])
    >>> head_map(rows, "entropy").data[0].z.tolist()
    [[1.0, 2.0]]
    """
    frame, declared = (heads, None) if isinstance(heads, pd.DataFrame) else (heads.heads, heads.metrics)
    rows = frame[frame["metric"] == metric]
    if not len(rows):
        raise ValueError(f"There is no metric {metric!r} here; there are: {', '.join(sorted(set(frame['metric'])))}.")
    about = as_text(describe(metric, declared))
    kinds = [kind for kind in KINDS if kind in set(rows["kind"])] + sorted(set(rows["kind"]) - set(KINDS))
    maps = [heat_map(rows[rows["kind"] == kind], about) for kind in kinds]
    layers = [trace.z.shape[0] for trace in maps]
    figure = blank(about.title, with_unit(about.meaning, f"({about.unit})" if about.unit else ""))
    for place, trace in enumerate(maps):
        trace.visible = place == 0
        figure.add_trace(trace)
    figure.update_xaxes(title="head", showgrid=False, constrain="domain", tick0=0, dtick=_step(maps, 1))
    figure.update_yaxes(title="layer", showgrid=False, autorange="reversed", tick0=0, dtick=_step(maps, 0))
    figure.update_layout(height=_height(layers[0]))
    if len(kinds) > 1:
        names = [str(KINDS.get(kind, kind)) for kind in kinds]
        shown = [[place == other for other in range(len(kinds))] for place in range(len(kinds))]
        arguments: list[list[dict[str, object]]] = [
            [{"visible": visible}, {"height": _height(n)}] for visible, n in zip(shown, layers, strict=True)
        ]
        figure.update_layout(updatemenus=[choices(names, arguments)], margin={"t": MENU_MARGIN})
    return figure


def heat_map(rows: pd.DataFrame, about: Metric) -> go.Heatmap:
    """One kind's cells of one metric, as a Plotly trace; the metric's words are HTML to Plotly."""
    shape = (int(rows["layer"].max()) + 1, int(rows["head"].max()) + 1)
    value, stderr, n = (np.full(shape, np.nan) for _ in range(3))
    place = (rows["layer"].to_numpy(), rows["head"].to_numpy())
    for grid, column in ((value, "value"), (stderr, "stderr"), (n, "n")):
        grid[place] = rows[column].to_numpy(dtype=float)
    return go.Heatmap(
        z=value,
        customdata=_hover(value, stderr, n, about.unit),
        hovertemplate="<b>L%{y}H%{x}</b><br>%{customdata}<extra></extra>",
        xgap=1.5,
        ygap=1.5,
        **colours(value, about),
        colorbar=colour_bar(about.unit),
    )


def colours(values: np.ndarray, about: Metric) -> dict[str, Any]:
    """Colour scale and range for values of a metric."""
    finite = values[np.isfinite(values)]
    low = float(finite.min()) if finite.size else 0.0
    high = float(finite.max()) if finite.size else 1.0
    if low < 0 < high:
        reach = max(-low, high)
        return {"colorscale": DIVERGING, "zmin": -reach, "zmax": reach, "reversescale": True}
    low = low if about.low is None else min(low, about.low)
    high = high if about.high is None else max(high, about.high)
    return {"colorscale": SEQUENTIAL, "zmin": low, "zmax": high if high > low else low + 1.0}


def _hover(value: np.ndarray, stderr: np.ndarray, n: np.ndarray, unit: str) -> np.ndarray:
    text = np.full(value.shape, "not measured", dtype=object)
    for place in np.argwhere(np.isfinite(value)):
        i = tuple(place)
        spread = f" ± {stderr[i]:.2g}" if np.isfinite(stderr[i]) else ""
        plural = "" if n[i] == 1 else "s"
        text[i] = f"{with_unit(f'{value[i]:.4g}{spread}', unit)}<br>{int(n[i]):,} sequence{plural}"
    return text


def _step(maps: list[go.Heatmap], axis: int) -> int:
    """Whole steps between the labels of layers or heads, at most 16 of them."""
    return -(-max(trace.z.shape[axis] for trace in maps) // 16)


def _height(layers: int) -> int:
    return int(np.clip(26 * layers + 150, 260, 900))

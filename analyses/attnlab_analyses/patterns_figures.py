"""Figures of the sparse patterns: the class of every head, what each pattern recalls, where the last rows look."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from attnlab.plots import PALETTE, blank, head_map, profile
from attnlab.results import Result
from attnlab_analyses.patterns_search import PATTERNS

WORDS = {"a_shape": "A-shape", "vertical_slash": "vertical-slash", "block": "block-sparse", "grid": "grid"}
"""What each pattern is called."""


def pattern_figures(result: Result) -> dict[str, go.Figure]:
    """All figures of a patterns result by name, the classes first."""
    if not len(result.table):
        return {}
    found = {"patterns": class_map(result.table)}
    found |= {f"recall_{name}": head_map(result, f"recall_{name}") for name in PATTERNS}
    for name, title, counted in (
        ("slash", "Attention of the last rows by distance", "distance 0 is the token itself"),
        ("vertical", "Attention of the last rows by key", "position 0 is the first token"),
    ):
        array = result.arrays[f"self.{name}"]
        edges = list(array.coordinates["position"])
        found[name] = profile(array.values, edges, title, f"mean mass in a bin; {counted}", unit="mass")
    hover = "<b>%{fullData.name}</b>, distance %{customdata}<br>%{y:.4g} mass<extra></extra>"
    found["slash"].update_traces(hovertemplate=hover)
    found["slash"].update_xaxes(title="distance (log scale)")
    return found


def class_map(table: pd.DataFrame) -> go.Figure:
    """Layers x heads, a colour for each pattern; how much of it is recalled, and of what share of keys, on hovering."""
    shape = (int(table["layer"].max()) + 1, int(table["head"].max()) + 1)
    number, texts = np.full(shape, np.nan), np.full(shape, "not measured", dtype=object)
    for row in table.to_dict("records"):
        place = (row["layer"], row["head"])
        number[place] = PATTERNS.index(row["pattern"])
        texts[place] = (
            f"{WORDS[row['pattern']]}, {row['votes']:.0%} of sequences<br>recalls {row['recall']:.1%} with "
            f"{row['share']:.1%} of the visible keys"
        )
    figure = blank("Sparse pattern of every head", "the pattern that recalls most attention at its budget")
    steps = [(edge, PALETTE[place]) for place in range(4) for edge in (place / 4, (place + 1) / 4)]
    figure.add_trace(
        go.Heatmap(
            z=number, customdata=texts, zmin=-0.5, zmax=3.5, colorscale=steps, xgap=1.5, ygap=1.5,
            hovertemplate="<b>L%{y}H%{x}</b><br>%{customdata}<extra></extra>",
            colorbar={
                "tickvals": list(range(4)), "ticktext": [WORDS[name] for name in PATTERNS], "thickness": 12,
                "outlinewidth": 0,
            },
        )
    )  # fmt: skip
    figure.update_xaxes(title="head", showgrid=False, constrain="domain", tick0=0, dtick=-(-shape[1] // 16))
    figure.update_yaxes(title="layer", showgrid=False, autorange="reversed", tick0=0, dtick=-(-shape[0] // 16))
    figure.update_layout(height=int(np.clip(26 * shape[0] + 150, 260, 900)))
    return figure

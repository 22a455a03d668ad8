"""Figures of the key budgets: attention kept at each budget, maps of heads, overlap of layers."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from attnlab.plots import PALETTE, blank, head_map
from attnlab.plots.matrix import matrix_figure
from attnlab.results import Result
from attnlab_analyses.key_policies import WORDS


def budget_figures(result: Result) -> dict[str, go.Figure]:
    """All figures of a budgets result by name, what the policies keep first."""
    if not len(result.table):
        return {}
    about = "attention of the last queries on the keys that are kept, mean over heads"
    found = {"kept": policy_lines(result.table, "kept", "Attention kept", about)}
    overlap = result.arrays["overlap"].values
    if len(overlap) > 1:
        title = "Overlap of layers' strongest keys"
        found["overlap"] = matrix_figure(overlap, title, rows="layer", columns="other layer", unit="of the keys")
        found["overlap"].data[0].update(zmin=0.0, zmax=1.0)
        layers = list(range(0, len(overlap), max(1, len(overlap) // 16)))
        found["overlap"].update_xaxes(tickvals=layers).update_yaxes(tickvals=layers)
    return found | {str(m): head_map(result, str(m)) for m in dict.fromkeys(result.heads["metric"])}


def policy_lines(table: pd.DataFrame, column: str, title: str, about: str, error: str | None = None) -> go.Figure:
    """A line for each policy over the budgets; `error` names a column of standard errors."""
    figure = blank(title, about)
    for place, policy in enumerate(dict.fromkeys(table["policy"])):
        rows = table[table["policy"] == policy]
        figure.add_trace(
            go.Scatter(
                x=100 * rows["budget"], y=rows[column], name=WORDS.get(policy, policy), mode="lines+markers",
                line={"color": PALETTE[place % len(PALETTE)]},
                error_y=None if error is None else {"type": "data", "array": rows[error].fillna(0), "width": 2},
                hovertemplate="<b>%{fullData.name}</b>, %{x:.3g} % of the keys<br>%{y:.4g}<extra></extra>",
            )
        )  # fmt: skip
    figure.update_xaxes(title="keys kept, % of the prompt", type="log", tickvals=(100 * table["budget"]).unique())
    figure.update_yaxes(title=column.replace("_", " "))
    return figure

"""Figures of the roles: which head has which role, and the map of each score."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from attnlab.plots import blank, head_map
from attnlab.plots.matrix import matrix_trace
from attnlab.results import Result
from attnlab_analyses.roles_definitions import METRICS, ROLES
from attnlab_analyses.sentences import kind_named

_MOST_HEADS = 60


def role_figures(result: Result) -> dict[str, go.Figure]:
    """All figures of a roles result by name, the roles at a glance first."""
    found = {}
    for kind in dict.fromkeys(result.table["kind"] if len(result.table) else ()):
        suffix = "" if kind == "self" else f"_{kind}"
        found[f"roles{suffix}"] = role_matrix(result.table[result.table["kind"] == kind], kind)
    there = set(result.heads["metric"])
    return found | {metric: head_map(result, metric) for metric in METRICS if metric in there}


def role_matrix(table: pd.DataFrame, kind: str) -> go.Figure:
    """Heads in rows, roles in columns: the share of sequences in which the head passes the role's threshold.

    Heads that have a role stand here, up to 60 of them; where none has, the heads that come nearest.
    """
    names = [role.name for role in ROLES]
    rates = table[[f"{name}_rate" for name in names]].to_numpy(dtype=float)
    highest = np.where(np.isfinite(rates), rates, -1.0).max(1)
    having = (table["roles"] != "").to_numpy()
    chosen = np.flatnonzero(having) if having.any() else np.arange(len(table))
    left_out = max(0, len(chosen) - _MOST_HEADS)
    chosen = np.sort(chosen[np.argsort(-highest[chosen], kind="stable")[:_MOST_HEADS]])
    who = "heads with a role" if having.any() else "no head has a role: those that come nearest"
    more = f"; {left_out} more are in the table" if left_out else ""
    figure = blank(f"Roles of heads, {kind_named(kind)}", f"share of sequences that pass the threshold; {who}{more}")
    shown = rates[chosen]
    labels = table["name"].to_numpy()[chosen]
    trace = matrix_trace(shown, unit="of sequences")
    texts = np.array([[f"{name}, {role.replace('_', ' ')}" for role in names] for name in labels], dtype=object)
    trace.update(
        customdata=texts, hovertemplate="<b>%{customdata}</b><br>%{z:.1%} of sequences<extra></extra>",
        zmin=0.0, zmax=1.0, xgap=2, ygap=2,
    )  # fmt: skip
    figure.add_trace(trace)
    figure.update_xaxes(
        tickvals=list(range(len(names))), ticktext=[name.replace("_", " ") for name in names], showgrid=False,
        tickangle=-30,
    )  # fmt: skip
    figure.update_yaxes(
        tickvals=list(range(len(labels))), ticktext=list(labels), autorange="reversed", showgrid=False,
    )  # fmt: skip
    figure.update_layout(height=int(np.clip(20 * len(labels) + 190, 260, 1400)))
    return figure

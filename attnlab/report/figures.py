"""Figures inside the report: their JSON beside an empty place, drawn when it comes into view."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from attnlab.plots.head_map import head_map
from attnlab.plots.metrics import describe, in_order

if TYPE_CHECKING:
    from attnlab.runs.run import Run

_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def figure_html(figure: go.Figure, name: str, classes: str = "") -> str:
    """A place for a figure and its data; `name` must be unique on the page."""
    height = int(figure.layout.height or 420)
    identifier = html.escape(name, quote=True)
    return (
        f'<figure class="card plot {classes}"><div class="figure" id="{identifier}" style="min-height:{height}px" '
        f'data-figure="{identifier}-data"></div>{_data(figure, f"{identifier}-data")}</figure>'
    )


def maps_html(run: Run) -> str:
    """The layer x head maps of all metrics: one place, and a choice of metrics above it.

    Analysis after analysis as they declare them, then those that none declares; series of numbers come last.
    """
    there = set(run.heads["metric"])
    metrics = in_order(metric for metric in (*run.metrics, *sorted(there)) if metric in there)
    titles = [describe(metric, run.metrics).title for metric in metrics]
    return chosen_html(titles, [head_map(run, metric) for metric in metrics], "map", "Metric")


def chosen_html(titles: Sequence[str], figures: Sequence[go.Figure], name: str, label: str) -> str:
    """One place for several figures, and a choice of their titles above it; `name` must be unique on the page."""
    buttons = "".join(
        f'<button type="button" data-show="{name}-{i}-data" aria-pressed="{str(i == 0).lower()}">'
        f"{html.escape(title)}</button>"
        for i, title in enumerate(titles)
    )
    data = "".join(_data(figure, f"{name}-{i}-data") for i, figure in enumerate(figures))
    height = max(int(figure.layout.height) for figure in figures)
    return (
        f'<div class="card"><div class="pills" role="group" aria-label="{label}" data-for="{name}">{buttons}</div>'
        f'<div class="figure" id="{name}" style="min-height:{height}px" data-figure="{name}-0-data"></div>{data}</div>'
    )


def own_figures(figures: Mapping[str, go.Figure], metrics: set[str]) -> dict[str, go.Figure]:
    """The figures of an analysis that are no maps of its metrics: those stand together at the top."""
    return {name: figure for name, figure in figures.items() if name not in metrics}


def _data(figure: go.Figure, identifier: str) -> str:
    text = str(figure.to_json())
    for character, escape in _UNSAFE.items():
        text = text.replace(character, escape)
    return f'<script type="application/json" id="{identifier}">{text}</script>'

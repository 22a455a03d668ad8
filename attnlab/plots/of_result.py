"""The figures of a result: its analysis' or experiment's own, or layer x head maps where that is not installed."""

from __future__ import annotations

import difflib

import plotly.graph_objects as go

from attnlab.errors import AttnlabError
from attnlab.experiments.registry import experiment_names, load_experiment
from attnlab.plots.head_map import head_map
from attnlab.results.result import Result
from attnlab.runs.registry import analysis_names, load_analysis


def figures_of(result: Result) -> dict[str, go.Figure]:
    """All figures of a result by name, the most telling one first."""
    if result.analysis in analysis_names():
        return load_analysis(result.analysis).figures(result)
    if result.analysis in experiment_names():
        return load_experiment(result.analysis).figures(result)
    return {str(metric): head_map(result, str(metric)) for metric in dict.fromkeys(result.heads["metric"])}


def figure_of(result: Result, name: str | None) -> go.Figure:
    """One figure of a result, the first without a name.

    Raises:
        AttnlabError: there is no such figure, or none at all.
    """
    figures = figures_of(result)
    if not figures:
        raise AttnlabError(f"The result of {result.analysis!r} holds nothing to plot.")
    if name is None:
        return next(iter(figures.values()))
    if name not in figures:
        near = difflib.get_close_matches(name, figures, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise AttnlabError(f"{result.analysis!r} has no plot {name!r}.{hint} There are: {', '.join(figures)}.")
    return figures[name]

"""Plotly figures of what analyses find; a figure is returned, never shown."""

from attnlab.plots.bars import top_bars
from attnlab.plots.head_map import head_map
from attnlab.plots.matrix import matrix_figure, pool_matrix, quantise
from attnlab.plots.metrics import describe
from attnlab.plots.profile import profile
from attnlab.plots.template import DIVERGING, PALETTE, SEQUENTIAL, TEMPLATE, blank
from attnlab.results.metric import Metric

__all__ = [
    "DIVERGING",
    "PALETTE",
    "SEQUENTIAL",
    "TEMPLATE",
    "Metric",
    "blank",
    "describe",
    "head_map",
    "matrix_figure",
    "pool_matrix",
    "profile",
    "quantise",
    "top_bars",
]

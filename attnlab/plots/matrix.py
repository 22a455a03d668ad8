"""Matrices of any size as a figure of bounded size: averaged in blocks, then kept as one byte a cell.

A float32 heat map of 2048 x 2048 is 28 MB of HTML. Up to `EXACT` cells a matrix is shown as it is; beyond, it is
averaged down to at most `SIDE` cells a side and quantised to hundredths of its range.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from attnlab.plots.template import SEQUENTIAL, blank, colour_bar

EXACT = 256 * 256
SIDE = 512
_LEVELS = 100


class Quantised(NamedTuple):
    """A matrix in hundredths of its range: value = low + level (high - low) / 100; 255 stands for NaN."""

    levels: np.ndarray
    low: float
    high: float


def pool_matrix(values: np.ndarray, rows: int = SIDE, columns: int = SIDE) -> np.ndarray:
    """Averages blocks so that at most `rows` x `columns` cells are left; NaNs are left out of the means.

    >>> pool_matrix(np.array([[1.0, 3.0, 5.0]]), 1, 2).tolist()
    [[2.0, 5.0]]
    """
    block = (-(-values.shape[0] // rows) or 1, -(-values.shape[1] // columns) or 1)
    starts = [np.arange(0, n, b) for n, b in zip(values.shape, block, strict=True)]
    there = np.isfinite(values)

    def block_sums(a: np.ndarray) -> np.ndarray:
        return np.add.reduceat(np.add.reduceat(a, starts[0], axis=0), starts[1], axis=1)

    count = block_sums(there.astype(np.float64))
    sums = block_sums(np.where(there, values, 0.0).astype(np.float64))
    return np.divide(sums, count, out=np.full(count.shape, np.nan), where=count > 0)


def quantise(values: np.ndarray) -> Quantised:
    """A matrix as one byte a cell; the error is at most half a hundredth of its range.

    >>> quantise(np.array([[0.0, 0.5, 2.0]])).levels.tolist()
    [[0, 25, 100]]
    """
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    scaled = (values - low) / ((high - low) or 1.0) * _LEVELS
    levels = np.where(np.isfinite(values), np.rint(np.nan_to_num(scaled)), 255).astype(np.uint8)
    return Quantised(levels, low, high)


def matrix_trace(
    values: np.ndarray, *, unit: str = "", scale: str = SEQUENTIAL, hover: str = "row %{y}, column %{x}"
) -> go.Heatmap:
    """A heat map trace of any matrix [rows, columns], pooled and quantised where it is large.

    Coordinates are the indices into the matrix as it was given.
    """
    if values.size <= EXACT:
        return go.Heatmap(
            z=values.astype(np.float32),
            colorscale=scale,
            hovertemplate=f"{hover}<br>%{{z:.4g}} {unit}<extra></extra>",
            colorbar=colour_bar(unit),
        )
    pooled = pool_matrix(values)
    steps = [-(-n // m) for n, m in zip(values.shape, (SIDE, SIDE), strict=True)]
    levels, low, high = quantise(pooled)
    ticks = np.linspace(0, _LEVELS, 5)
    # A byte cannot be NaN: a matrix with holes takes four bytes a cell.
    z: np.ndarray = levels if not (levels == 255).any() else np.where(levels == 255, np.nan, levels).astype(np.float32)
    return go.Heatmap(
        z=z,
        x0=(steps[1] - 1) / 2,
        dx=steps[1],
        y0=(steps[0] - 1) / 2,
        dy=steps[0],
        zmin=0,
        zmax=_LEVELS,
        colorscale=scale,
        hovertemplate=f"{hover}<br>%{{z:d}} % of the way from {low:.3g} to {high:.3g} {unit}<extra></extra>",
        colorbar=colour_bar(
            unit, tickvals=ticks.tolist(), ticktext=[f"{low + (high - low) * t / 100:.3g}" for t in ticks]
        ),
    )


def matrix_figure(values: np.ndarray, title: str, *, rows: str, columns: str, unit: str = "") -> go.Figure:
    """A matrix [rows, columns] as a figure.

    >>> figure = matrix_figure(np.eye(1000), "Attention", rows="query", columns="key")
    >>> figure.data[0].z.shape, figure.data[0].z.dtype.name
    ((500, 500), 'uint8')
    """
    figure = blank(title, unit)
    figure.add_trace(matrix_trace(values, unit=unit, hover=f"{rows} %{{y}}, {columns} %{{x}}"))
    figure.update_xaxes(title=columns, showgrid=False)
    figure.update_yaxes(title=rows, showgrid=False, autorange="reversed")
    return figure

"""Figures of the sinks: maps of heads, alpha over positions, the strongest heads and tokens, hidden states."""

from __future__ import annotations

import html
import itertools

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from attnlab.plots import blank, head_map, profile, top_bars
from attnlab.plots.matrix import matrix_trace
from attnlab.plots.profile import HEIGHT, layer_means
from attnlab.results import NamedArray, Result
from attnlab.view.tokens import readable
from attnlab_analyses.sentences import kind_named

_TOP = 15
_MAPS = (
    *("sink_mass", "sink_rate", "other_sink_rate", "learned_sink_mass", "first_key_cosine", "hardness"),
    *("concentration", "sink_rate_random", "sink_rate_repeated"),
)
_FEATURES = 6
_FEW_READERS = 0.05
"""Positions with less than this share of the first one's readers are not drawn: their alpha is next to nobody's."""


def sink_figures(result: Result) -> dict[str, go.Figure]:
    """All figures of a sinks result by name, the map of alpha_1 first."""
    metrics = [m for m in _MAPS if m in set(result.heads["metric"])]
    found = {metric: head_map(result, metric) for metric in metrics}
    for kind in dict.fromkeys(result.heads["kind"]):
        if f"{kind}.alpha" not in result.arrays:
            continue
        suffix = "" if kind == "self" else f"_{kind}"
        alpha, readers = result.arrays[f"{kind}.alpha"], result.arrays[f"{kind}.readers"]
        found[f"positions{suffix}"] = alpha_by_position(alpha, readers, kind)
        found[f"positions_by_head{suffix}"] = profile(
            _drawn(alpha, readers),
            list(alpha.coordinates["position"]),
            f"α by key position, {kind_named(kind)}",
            "mass received per reader; position 1 is the first visible key",
            unit="per reader",
            weights=readers.values,
            first=1,
        )
        found[f"top_heads{suffix}"] = _top_heads(result.heads[result.heads["kind"] == kind], kind)
        table = result.table[result.table["kind"] == kind]
        if len(table):
            found[f"top_tokens{suffix}"] = _top_tokens(table, kind)
        cosines, massive = (result.arrays.get(f"{kind}.{name}") for name in ("cosine_to_first", "massive"))
        if cosines is not None and np.isfinite(cosines.values).any():
            found[f"hidden_states{suffix}"] = _hidden_states(cosines, kind)
        if massive is not None:
            found[f"massive_activations{suffix}"] = _massive_activations(massive, kind)
    return found


def alpha_by_position(alpha: NamedArray, readers: NamedArray, kind: str) -> go.Figure:
    """Heat map of alpha by layer and key position, the heads of a layer averaged."""
    edges = list(alpha.coordinates["position"])
    values = layer_means(_drawn(alpha, readers), readers.values)
    values = values[:, : int(np.isfinite(values).any(0).nonzero()[0].max(initial=0)) + 1]
    edges = edges[: values.shape[1] + 1]
    names = [str(a + 1) if b == a + 1 else f"{a + 1}–{b}" for a, b in itertools.pairwise(edges)]
    figure = blank(
        f"α by layer and key position, {kind_named(kind)}", "mass received per reader, mean over the heads of a layer"
    )
    trace = matrix_trace(values, unit="")
    if trace.z.shape == values.shape:
        texts = np.broadcast_to(np.array(names, dtype=object), values.shape)
        trace.update(customdata=texts)
        trace.update(
            hovertemplate="layer %{y}, position %{customdata}<br>α = %{z:.4g}<extra></extra>", xgap=0.5, ygap=1
        )
    figure.add_trace(trace)
    step = next((s for s in (1, 2, 5, 10) if 8 * s >= len(names)), 20)
    ticks = list(dict.fromkeys([0, *range(step - 1, len(names), step)]))
    figure.update_xaxes(
        title="key position", showgrid=False, tickvals=ticks, ticktext=[names[t] for t in ticks], tickangle=0
    )
    figure.update_yaxes(title="layer", showgrid=False, autorange="reversed", tick0=0, dtick=-(-values.shape[0] // 16))
    figure.update_layout(height=int(np.clip(22 * values.shape[0] + 170, HEIGHT, 800)))
    return figure


def _hidden_states(cosines: NamedArray, kind: str) -> go.Figure:
    figure = blank(
        f"Likeness to the first token's hidden state, {kind_named(kind)}",
        "mean cosine; the last point is what leaves the last block",
    )
    for values, name in zip(cosines.values.T, cosines.coordinates["tokens"], strict=True):
        if np.isfinite(values).any():
            figure.add_trace(_by_layer(values, f"tokens {name}" if name.startswith("past") else name, "cosine"))
    figure.update_yaxes(title="cosine")
    return _over_layers(figure, len(cosines.values))


def _massive_activations(massive: NamedArray, kind: str) -> go.Figure:
    figure = blank(
        f"Massive activations, {kind_named(kind)}",
        "mean over where they stand, by feature; the last point is what leaves the last block",
    )
    for feature, values in zip(massive.coordinates["feature"][:_FEATURES], massive.values.T, strict=False):
        figure.add_trace(_by_layer(values, f"feature {feature}", ""))
    figure.update_yaxes(title="activation")
    return _over_layers(figure, len(massive.values))


def _over_layers(figure: go.Figure, points: int) -> go.Figure:
    figure.update_xaxes(title="layer that they enter", showgrid=False, tick0=0, dtick=-(-points // 16))
    return figure.update_layout(showlegend=True)


def _by_layer(values: np.ndarray, name: str, unit: str) -> go.Scatter:
    hover = f"<b>%{{fullData.name}}</b>, layer %{{x}}<br>%{{y:.4g}} {unit}<extra></extra>"
    return go.Scatter(x=list(range(len(values))), y=values, name=name, mode="lines+markers", hovertemplate=hover)


def _drawn(alpha: NamedArray, readers: NamedArray) -> np.ndarray:
    few = readers.values < _FEW_READERS * readers.values[..., :1]
    return np.where(few, np.nan, alpha.values)


def _top_heads(heads: pd.DataFrame, kind: str) -> go.Figure:
    rows = heads[heads["metric"] == "sink_mass"].nlargest(_TOP, "value")
    rates = heads[heads["metric"] == "sink_rate"].set_index(["layer", "head"])["value"]
    places = list(zip(rows["layer"], rows["head"], strict=True))
    return top_bars(
        [f"L{layer}H{head}" for layer, head in places],
        rows["value"].tolist(),
        f"Heads with most mass on the first token, {kind_named(kind)}",
        "α₁, mean over sequences",
        unit="α₁",
        hover=[f"sink rate {rates.get(place, float('nan')):.2f}" for place in places],
    )


def _top_tokens(table: pd.DataFrame, kind: str) -> go.Figure:
    rows = table.nlargest(_TOP, "alpha")
    # Tokens are anybody's text, and Plotly reads labels as HTML.
    labels = [
        html.escape(readable(str(token)), quote=False)
        + (" (first)" if first else "")
        + (f" · {token_id}" if str(token) != str(token_id) else "")
        for token, first, token_id in zip(rows["token"], rows["first"], rows["token_id"], strict=True)
    ]
    return top_bars(
        labels,
        rows["alpha"].tolist(),
        f"Tokens that receive most, {kind_named(kind)}",
        "mass received per reader over all heads; “first” is the token at the first position",
        unit="α",
        hover=[f"{count:,} occurrences" for count in rows["count"]],
    )

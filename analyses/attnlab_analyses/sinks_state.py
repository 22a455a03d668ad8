"""What the analysis of sinks gathers of one kind of attention, call by call.

Shapes: L layers, H heads, B sequences, Nq queries, Nk keys, P bins of positions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from attnlab.capture.call import Call, Kind, Site
from attnlab.results import Metric, NamedArray
from attnlab_analyses.moments import HeadMoments
from attnlab_analyses.received import Received, TokenSums, received
from attnlab_analyses.rows import counting_rows, float64, mean_over_rows
from attnlab_analyses.sentences import heads_named
from attnlab_analyses.sinks_concentration import concentration, hardness
from attnlab_analyses.sinks_hidden import HiddenSums
from attnlab_analyses.sinks_inputs import OWN
from attnlab_analyses.sinks_keys import METRICS as OF_KEYS
from attnlab_analyses.sinks_keys import key_bias
from attnlab_analyses.sinks_positions import EDGES, PositionSums, metrics_of, passing

TOP_TOKENS = 100
_OF_SINKS = {
    "sink_mass": Metric(
        "Mass on the first token", "", "α₁, mean over query rows of the weight on the first visible key", 0.0, 0.3
    ),
    "sink_rate": Metric("Sink rate", "", "share of sequences in which α₁ is above the threshold", 0.0, 1.0),
    "sink_share": Metric("Share of the first token", "", "α₁ of a sigmoid's rows, each divided by its sum", 0.0, 0.3),
    "sink_share_rate": Metric(
        "Sink rate by share", "", "share of sequences in which a sigmoid's α₁, by share, passes the threshold", 0.0, 1.0
    ),
    "other_sink_rate": Metric(
        "Sinks past the first token", "", "share of sequences in which a later key passes the threshold", 0.0, 1.0
    ),
    "sink_count": Metric("Sinks in a sequence", "keys", "keys that pass the threshold, the first included", 0.0),
}
METRICS = {
    **_OF_SINKS,
    "learned_sink_mass": Metric("Mass on the learned sink", "", "mean over query rows", 0.0, 1.0),
    **OF_KEYS,
    "hardness": Metric("Hardness", "", "rows × the largest squared norm of a column: 1 uniform, rows² one key", 0.0),
    "concentration": Metric("Concentration", "", "mean over query rows of the sum of the K largest weights", 0.0, 1.0),
}


class Options(NamedTuple):
    """The options that the state of a kind depends on; `Sinks` says what they are."""

    threshold: float
    k: tuple[int, ...]
    largest: int
    massive_least: float
    massive_ratio: float


def own_metrics(inputs: tuple[str, ...]) -> dict[str, Metric]:
    """The metrics that are measured on random and on repeated tokens.

    >>> own_metrics(("natural", "repeated"))["sink_rate_repeated"].title
    'Sink rate, one token repeated'
    """
    return {
        f"{metric}_{name}": about._replace(title=f"{about.title}, {words}")
        for name, words in OWN.items()
        if name in inputs
        for metric, about in _OF_SINKS.items()
    }


class SinkState:
    """The state of one kind of attention.

    Attributes:
        metrics: moments of each metric of the heads over sequences.
        positions: sums by position.
        tokens: sums by token.
        hidden: sums of hidden states.
        short: sequences so short that uniform attention passes the threshold.
    """

    def __init__(self, kind: Kind, heads: tuple[int, ...], options: Options, extra: Iterable[str] = ()) -> None:
        self.kind, self.n_heads, self.options = kind, heads, options
        self.metrics = {name: HeadMoments(heads) for name in (*METRICS, *extra)}
        self.positions = PositionSums(heads)
        self.tokens = TokenSums(len(heads))
        self.hidden = HiddenSums(len(heads), options.massive_least, options.massive_ratio)
        self.short = torch.zeros((), dtype=torch.int64)
        self._position: Tensor | None = None

    def seen(self) -> bool:
        """Whether any sequence has come."""
        return any(bool((moments.count > 0).any()) for moments in self.metrics.values())

    def natural(self) -> bool:
        """Whether any sequence of the data has."""
        return bool((self.metrics["sink_mass"].count > 0).any())

    def update(self, call: Call, ids: Tensor | None) -> dict[str, Tensor]:
        """Takes in one layer; the metrics of each sequence, [B, H].

        Args:
            call: with column sums, and with q, k, v, and the hidden state where it can be had.
            ids: [B, Nk] token ids of the keys; None where they are not known.
        """
        site, layer, emitted = call.site, call.layer, call.emitted
        rows, visible = _rows(call)
        keys = received(site, emitted, rows)
        found = passing(keys, self.options.threshold)
        values = self._of_sinks(call, keys, rows)
        if emitted.learned_sink_mass is not None:
            values["learned_sink_mass"] = mean_over_rows(emitted.learned_sink_mass, rows)
        values |= key_bias(call, keys, found.beyond, rows, visible)
        values["hardness"] = hardness(emitted, rows)
        if self.options.largest:
            values["concentration"] = concentration(emitted, rows, self.options.largest)
        self.take(layer, values)
        self.positions.add(layer, keys, found)
        cosine = None
        self._position = None
        if call.hidden is not None and self.kind != "cross" and site.n_queries == site.n_keys:
            self._position = keys.position
            cosine = self.hidden.add(layer, call.hidden, keys.position, ids, found.beyond.any(1))
        if ids is not None:
            self.tokens.add(layer, ids, keys, found.sinks, cosine)
        if layer == 0:
            uniform = mean_over_rows(1.0 / float64(visible).clamp(min=1), rows)
            self.short += (uniform > self.options.threshold).any(1).sum().cpu()
        return values

    def update_last(self, site: Site, hidden: Tensor, ids: Tensor | None) -> None:
        """Takes in what left the last block, [B, N, d]."""
        if self._position is not None and self._position.shape == hidden.shape[:2]:
            self.hidden.add(len(self.n_heads), hidden, self._position, ids, None)

    def of_own(self, call: Call) -> dict[str, Tensor]:
        """The metrics of one layer on sequences of the analysis' own, [B, H]."""
        rows, _ = _rows(call)
        return self._of_sinks(call, received(call.site, call.emitted, rows), rows)

    def _of_sinks(self, call: Call, keys: Received, rows: Tensor) -> dict[str, Tensor]:
        first = first_alpha(keys, rows)
        values = {"sink_mass": first, "sink_rate": self._passes(first)}
        if call.site.normalizer == "sigmoid":
            values["sink_share"] = first_share(call, rows)
            values["sink_share_rate"] = self._passes(values["sink_share"])
        return values | metrics_of(passing(keys, self.options.threshold))

    def _passes(self, alpha: Tensor) -> Tensor:
        return torch.where(alpha.isnan(), alpha, (alpha > self.options.threshold).double())

    def take(self, layer: int, values: Mapping[str, Tensor]) -> None:
        """Takes in metrics [B, H] of one layer."""
        for metric, value in values.items():
            self.metrics[metric].add(layer, value)

    def merge(self, other: SinkState) -> None:
        """Adds the state of the data that follows."""
        for name, moments in self.metrics.items():
            moments.merge(other.metrics[name])
        self.positions.merge(other.positions)
        self.tokens.merge(other.tokens)
        self.hidden.merge(other.hidden)
        self.short += other.short

    def state_dict(self) -> dict[str, Tensor]:
        """The whole state as tensors."""
        state = {"short": self.short} | self.positions.state_dict() | self.tokens.state_dict("tokens")
        state |= {f"hidden.{name}": tensor for name, tensor in self.hidden.state_dict().items()}
        for name, moments in self.metrics.items():
            state |= moments.state_dict(name)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes the state that `state_dict` gave."""
        self.short = state["short"].clone()
        self.positions.load_state_dict(state)
        self.tokens.load_state_dict(state, "tokens")
        start = "hidden."
        self.hidden.load_state_dict({k.removeprefix(start): t for k, t in state.items() if k.startswith(start)})
        for name, moments in self.metrics.items():
            moments.load_state_dict(state, name)

    def head_rows(self) -> list[tuple[object, ...]]:
        """Tidy rows of every metric that was measured."""
        found: list[tuple[object, ...]] = []
        for (name, moments), (layer, head) in itertools.product(self.metrics.items(), heads_named(self.n_heads)):
            n = int(moments.count[layer, head])
            if n:
                value, stderr = float(moments.mean[layer, head]), float(moments.stderr()[layer, head])
                found.append((layer, head, self.kind, name, value, stderr, n))
        return found

    def arrays(self) -> dict[str, NamedArray]:
        """Alpha, readers and sinks by position, and cosines of hidden states by layer."""
        used, sums = self.positions.used(), self.positions
        axes, where = ("layer", "head", "position"), {"position": EDGES[: used + 1]}

        def by_position(values: Tensor, unit: str, text: str) -> NamedArray:
            return NamedArray(values[..., :used].numpy(), axes, where, unit, text)

        found = {
            "alpha": by_position(sums.alpha(), "attention", "Mass received per reader, by key position."),
            "readers": by_position(sums.readers, "rows", "Pairs of a query and a key at a position."),
            "sinks": by_position(sums.sinks, "keys", "Keys at a position, one of each sequence, that are sinks."),
            "able": by_position(sums.able, "keys", "Keys at a position with enough readers to be one."),
        }
        if self.hidden.seen():
            found["cosine_to_first"] = NamedArray(
                self.hidden.cosines().numpy(), ("layer", "tokens"),
                {"layer": list(range(len(self.n_heads) + 1)), "tokens": ["past the first", "sinks past the first"]},
                "cosine", "Mean cosine of hidden states to the first token's, entering a block and leaving the last.",
            )  # fmt: skip
        features, means = self.hidden.by_feature()
        if len(features):
            found["massive"] = NamedArray(
                means.numpy(), ("layer", "feature"),
                {"layer": list(range(len(self.n_heads) + 1)), "feature": features.tolist()},
                "activation", "Mean massive activation, entering a block and leaving the last.",
            )  # fmt: skip
        return {f"{self.kind}.{name}": array for name, array in found.items()}

    def token_table(self, texts: tuple[str, ...] | None) -> pd.DataFrame:
        """The tokens that receive most, those at the first position apart from the same tokens elsewhere."""
        return self.tokens.table(self.kind, texts, TOP_TOKENS)


class _Rows(NamedTuple):
    rows: Tensor
    visible: Tensor


def _rows(call: Call) -> _Rows:
    """The rows that count, and how many keys each sees, both [B, H, Nq]."""
    emitted = call.emitted
    assert emitted.key_sum is not None
    assert emitted.visible is not None
    visible = emitted.visible.expand(*emitted.key_sum.shape[:2], -1)
    return _Rows(counting_rows(call.site, visible), visible)


def first_keys(site: Site) -> Tensor:
    """Number of the first key of each sequence that is no padding, [B, 1]."""
    if site.key_mask is None:
        return torch.zeros(site.batch, 1, dtype=torch.int64, device=site.device)
    return site.key_mask.int().argmax(-1, keepdim=True)


def first_share(call: Call, rows: Tensor) -> Tensor:
    """alpha_1 of a sigmoid attention whose rows are each divided by their sum, as the paper takes it, [B, H].

    Args:
        call: with `columns` at the first keys and `lse`, the logarithm of a row's sum.
        rows: [B, H, Nq] rows that count.
    """
    assert call.emitted.columns is not None
    assert call.emitted.lse is not None
    total = float64(call.emitted.lse).exp()
    return mean_over_rows(float64(call.emitted.columns[..., 0]) / torch.where(total > 0, total, 1.0), rows)


def first_alpha(keys: Received, rows: Tensor) -> Tensor:
    """alpha_1 of each sequence and head, [B, H]: mean over its rows of the weight on the first key; NaN without."""
    place = (keys.position == 0).int().argmax(-1)
    mass = keys.mass.gather(-1, place[:, None, None].expand(-1, keys.mass.shape[1], 1))[..., 0]
    number = rows.sum(-1).to(mass.device)
    return torch.where(number > 0, mass / number.clamp(min=1), torch.nan)

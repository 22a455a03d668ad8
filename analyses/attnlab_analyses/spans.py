"""Spans: how far back each head has to look, by what the loss would lose to first order (MoA, arXiv 2406.14909).

When A_ij is removed and its row renormalised, the loss changes to first order by
-A_ij (G_ij - sum_n G_in A_in) / (1 - A_ij), where G = dLoss/dA. Summed over the 64 x 64 blocks that a span leaves out,
that is what the span costs a head; its smallest span is the first from which on no span costs more than a tolerance.

G_ij = dLoss/dz_i . v_j, so one backward pass that stops at every head's z, and one pass of gradient products over each
layer, give the blocks of all heads: no matrix is formed. The loss is the mean over a sequence's tokens.

Published code differs in two places: it adds the machine's epsilon to 1 - A, where here a row's largest entry is
compared with the mean over the others; and it counts a first row's only entry as removable, which here changes nothing.
Spans are added up as if heads did not interact; with `measure` the model is run once more with all of them together.

Shapes: B sequences, L layers, H heads, N tokens, n blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from torch import Tensor

from attnlab.capture import capture
from attnlab.capture.intervention import Intervention
from attnlab.errors import AttnlabError
from attnlab.experiments.base import Experiment
from attnlab.experiments.context import Context
from attnlab.interventions import Streaming
from attnlab.options import check_number, check_whole, check_yes_or_no
from attnlab.plots import head_map, profile
from attnlab.results import Metric, NamedArray, Result, heads_frame
from attnlab.runs.analysis import Batch
from attnlab_analyses.removal_cost import loss_by_block_distance, loss_gradients, mean_loss, no_next_token
from attnlab_analyses.sentences import counted, heads_named

if TYPE_CHECKING:
    from attnlab.models import Model

METRICS = {
    "span": Metric("Span", "tokens", "smallest window from which on none costs more than the tolerance", 0.0),
    "span_cost": Metric("Span cost", "nats", "loss of a token with the first tokens and the smallest window alone"),
}


@dataclass(frozen=True)
class Spans(Experiment):
    """The smallest span of each head, and the loss that spans cost.

    Attributes:
        block: side of the blocks in tokens; spans are whole blocks.
        sink: first tokens that every span keeps, a multiple of the block.
        tolerance: loss in nats a token that a head's span may cost.
        measure: whether to run the model with every head at its span, too.
    """

    block: int = 64
    sink: int = 64
    tolerance: float = 0.001
    measure: bool = True

    name: ClassVar[str] = "spans"
    summary: ClassVar[str] = "smallest span of each head, by the first-order loss of what it leaves out"

    def __post_init__(self) -> None:
        check_number("tolerance", self.tolerance, 0)
        check_whole("block", self.block, 1)
        check_yes_or_no("measure", self.measure)
        if type(self.sink) is not int or self.sink < 0 or self.sink % self.block:
            raise AttnlabError(
                f"The option sink is {self.sink!r}; a multiple of the block ({self.block}) or 0 was expected."
            )

    def refusal(self, model: Model) -> str | None:
        """It needs a loss of the next token, gradients, and rows that a softmax normalises."""
        return no_next_token(model)

    def run(self, context: Context) -> Result:
        """Blocks of every head, spans from these, and the loss with them."""
        model = context.model
        assert context.sequences is not None
        blocks = max(1, -(-max(context.sequences.lengths) // self.block))
        total = sum(1 for _ in context.batches())
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(context.batches()):
            found = context.step(f"blocks-{i}", lambda batch=batch: self._costs(model, batch, blocks))  # type: ignore[misc]
            sums = {name: sums.get(name, torch.zeros(())) + tensor for name, tensor in found.items()}
            context.say("gradients of batches", i + 1, total)
        n = float(sums["count"])
        if not n:
            raise AttnlabError("No sequence has two tokens, so that there is no loss; give longer texts.")
        costs = _Costs.of(sums)
        spans = smallest_spans(costs.mean, self.tolerance)
        measured = None
        if self.measure:
            edits = self._streaming(model, spans, self._whole(blocks))
            change = torch.zeros((), dtype=torch.float64)
            for i, batch in enumerate(context.batches()):
                found = context.step(f"measured-{i}", lambda batch=batch: _losses(model, batch, edits))  # type: ignore[misc]
                change = change + found["loss"]
                context.say("losses of batches", i + 1, total)
            measured = float((change - sums["loss"]) / n)
        return self._result(model, costs, spans, float(sums["loss"]) / n, measured)

    @classmethod
    def figures(cls, result: Result) -> dict[str, go.Figure]:
        """Spans of all heads, and what a span costs by its length."""
        if not len(result.heads):
            return {}
        array = result.arrays["predicted"]
        windows = array.coordinates["window"]
        title, about = "What a window costs", "first-order loss of what it leaves out, nats a token"
        cost = profile(array.values, [*windows, 2 * windows[-1]], title, about, unit="nats")
        hover = "<b>%{fullData.name}</b>, a window of %{x} tokens<br>%{y:.4g} nats<extra></extra>"
        cost.update_traces(x=windows, hovertemplate=hover)
        cost.update_xaxes(title="window in tokens (log scale)")
        return {
            "span": head_map(result, "span"),
            "cost": cost,
            "span_cost": head_map(result, "span_cost"),
        }

    def _costs(self, model: Model, batch: Batch, blocks: int) -> dict[str, Tensor]:
        """Sums over sequences of what each window costs [L, H, n], of its square, and of the loss."""
        # A sequence of one token predicts nothing: it has no loss, and does not count.
        count = (batch.attention_mask.sum(-1) > 1).sum().double().cpu()
        heads = model.layout.heads["self"]
        cost = torch.zeros(len(batch.index), len(heads), max(heads), blocks, dtype=torch.float64)
        if not count:
            return {"sum": cost.sum(0), "square": cost.sum(0), "loss": count, "count": count}
        losses, layers = loss_gradients(model, batch)
        for layer, of in layers.items():
            far = loss_by_block_distance(of, self.block, self.sink // self.block)
            # A window of w blocks leaves out what is w blocks away and further.
            cost[:, layer, : far.shape[1], : far.shape[2] - 1] = far.flip(-1).cumsum(-1).flip(-1)[..., 1:].cpu()
        losses = losses.double().cpu()
        return {"sum": cost.sum(0), "square": cost.square().sum(0), "loss": losses.sum(), "count": count}

    def _whole(self, blocks: int) -> int:
        """Blocks of the smallest window that with the first tokens leaves nothing out of so many blocks."""
        return max(1, blocks - self.sink // self.block)

    def _streaming(self, model: Model, spans: Tensor, everything: int) -> list[Intervention]:
        """One intervention for each window; heads that need everything are left as they are."""
        by_window: dict[int, dict[int, list[int]]] = {}
        for layer, head in heads_named(model.layout.heads["self"]):
            by_window.setdefault(int(spans[layer, head]), {}).setdefault(layer, []).append(head)
        return [
            Streaming(heads, first_tokens=self.sink, window=window * self.block)
            for window, heads in sorted(by_window.items())
            if window < everything
        ]

    def _result(self, model: Model, costs: _Costs, spans: Tensor, loss: float, measured: float | None) -> Result:
        heads, n = model.layout.heads["self"], costs.sequences
        named = heads_named(heads)
        blocks = costs.mean.shape[-1]
        at = (spans - 1)[..., None]
        predicted, stderr = (part.gather(-1, at)[..., 0] for part in (costs.mean, costs.stderr()))
        table = pd.DataFrame(
            {
                "layer": layer,
                "head": head,
                "name": name,
                "window": int(spans[layer, head]) * self.block,
                "everything": int(spans[layer, head]) >= self._whole(blocks),
                "predicted": float(predicted[layer, head]),
                "stderr": float(stderr[layer, head]),
            }
            for (layer, head), name in named.items()
        )
        smallest, spread = costs.mean[..., 0], costs.stderr()[..., 0]
        rows: list[tuple[object, ...]] = [
            (*place, "self", "span", float(spans[place]) * self.block, float("nan"), n) for place in named
        ]
        rows += [(*p, "self", "span_cost", float(smallest[p]), float(spread[p]), n) for p in named]
        windows = [self.block * (w + 1) for w in range(blocks)]
        arrays = {
            "predicted": NamedArray(
                np.where(_there(heads)[..., None], costs.mean.numpy(), np.nan), ("layer", "head", "window"),
                {"window": windows}, "nats", "First-order change of the loss with the first tokens and a window alone.",
            )
        }  # fmt: skip
        found = tuple(self._findings(table, loss, measured))
        return Result(self.name, found, heads_frame(rows), table, arrays, metrics=METRICS)

    def _findings(self, table: pd.DataFrame, loss: float, measured: float | None) -> list[str]:
        near = table[~table["everything"]]
        found = [
            f"{len(near)} of {counted(len(table), 'head')} can do with the first {counted(self.sink, 'token')} and a "
            f"window, at a predicted loss of at most {self.tolerance:g} nats each; the median window is "
            f"{table['window'].median():,.0f} tokens."
        ]
        if measured is not None:
            found.append(
                f"Together their windows are predicted to cost {near['predicted'].sum():+.4f} nats a token and "
                f"measured to cost {measured:+.4f}; the loss is {loss:.4f}."
            )
        far = table[table["everything"]].sort_values("predicted", ascending=False)
        if len(far):
            more = f" and {len(far) - 6} more" if len(far) > 6 else ""
            found.append(f"Heads that need every token: {', '.join(far['name'].head(6))}{more}.")
        return found


class _Costs(NamedTuple):
    """Mean [L, H, n] over sequences, sum of squared deviations, and number of sequences."""

    mean: Tensor
    deviations: Tensor
    sequences: int

    @classmethod
    def of(cls, sums: dict[str, Tensor]) -> _Costs:
        n = float(sums["count"])
        mean = sums["sum"] / n
        return cls(mean, (sums["square"] - n * mean.square()).clamp(min=0), int(n))

    def stderr(self) -> Tensor:
        if self.sequences < 2:
            return torch.full_like(self.mean, torch.nan)
        return (self.deviations / (self.sequences - 1) / self.sequences).sqrt()


def smallest_spans(cost: Tensor, tolerance: float) -> Tensor:
    """[L, H] number of blocks from which on no window costs more than the tolerance; cost [L, H, n].

    >>> smallest_spans(torch.tensor([[[0.0, 0.5, 0.1, 0.0]]]), 0.2).tolist()
    [[3]]
    """
    above = cost > tolerance
    places = torch.arange(1, cost.shape[-1] + 1)
    return (torch.where(above, places, 0).amax(-1) + 1).clamp(max=cost.shape[-1])


def _losses(model: Model, batch: Batch, edits: list[Intervention]) -> dict[str, Tensor]:
    with torch.no_grad(), capture(model, emit=lambda site: None, interventions=edits):
        return {"loss": mean_loss(model, batch).double().sum().cpu()}


def _there(heads: tuple[int, ...]) -> np.ndarray:
    return np.arange(max(heads)) < np.array(heads)[:, None]

"""Attention sinks: positions that draw attention whatever the text, the first token above all.

The metric of Gu et al., "When Attention Sink Emerges in Language Models" (arXiv 2410.10781):
alpha_k = 1/(T-k+1) sum over i >= k of A_ik, and Sink_k^eps = mean over layers and heads of 1[alpha_k > eps], eps = 0.3.
The indicator is applied to each sequence, then averaged. Key 1 is the first key of the sequence that any query sees, so
padding on the left is no sink; in cross-attention it is the encoder's first token. Where attention is not causal every
query is a reader of every key. The paper measures at T = 64: uniform attention alone gives alpha_1 =
(1 + 1/2 + ... + 1/T)/T, which passes 0.3 below ten tokens.

Beside the metric: sinks at other positions (`sinks_positions`), what their keys and values are like (`sinks_keys`),
hidden states and massive activations (`sinks_hidden`), concentration (`sinks_concentration`), and the metric on random
and on repeated tokens (`sinks_inputs`). The map over positions and the table of tokens count each pair of a query and a
key once: mass received / readers. `docs/sinks.md` has the definitions on one page.

Shapes: L layers, H heads, B sequences, Nq queries, Nk keys, P bins of positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import pandas as pd
import plotly.graph_objects as go
from attnlab_kernels import Emit
from torch import Tensor

from attnlab.capture.call import Call, Site
from attnlab.errors import AttnlabError
from attnlab.options import check_number, check_whole, check_yes_or_no
from attnlab.results import Result, heads_frame
from attnlab.runs.analysis import Batch, Layout, Needs
from attnlab_analyses.by_kind import AnalysisByKind
from attnlab_analyses.massive import LEAST, RATIO
from attnlab_analyses.sentences import kinds_in_order
from attnlab_analyses.sinks_figures import sink_figures
from attnlab_analyses.sinks_findings import findings
from attnlab_analyses.sinks_inputs import NATURAL, by_input, checked_inputs, own_tokens
from attnlab_analyses.sinks_positions import SINGLE
from attnlab_analyses.sinks_state import METRICS, Options, SinkState, first_keys, own_metrics

if TYPE_CHECKING:
    from attnlab.models import Model
    from attnlab.runs.data import Sequences

THRESHOLD = 0.3
"""eps of the paper."""
SEQUENCES, LENGTH = 100, 64
"""Random and repeated tokens: the paper's number of sequences, and T."""


class Sinks(AnalysisByKind[SinkState]):
    """Where attention sinks: alpha_1 by head, the sink rate, sinks elsewhere, and what goes with them.

    Options:
        threshold: eps, a share of attention.
        k: positions (from 1, up to 64) whose Sink_k^eps the findings give.
        inputs: which of `natural` (the data), `random` and `repeated` the metric is measured on.
        sequences, length, start: of random and repeated tokens: how many, of how many tokens, and whether the tokens
            that the tokenizer puts before a text come first.
        largest: K of C_K, the sum of a row's K largest entries; 0 for none, since it is a search in every row.
        massive_least, massive_ratio: both thresholds of massive activations.
    """

    name: ClassVar[str] = "sinks"
    summary: ClassVar[str] = (
        "attention sinks: at the first token and elsewhere, their keys, hidden states and massive activations"
    )

    def __init__(
        self,
        layout: Layout,
        threshold: float = THRESHOLD,
        k: tuple[int, ...] = (1,),
        inputs: tuple[str, ...] = (NATURAL,),
        sequences: int = SEQUENCES,
        length: int = LENGTH,
        start: bool = False,
        largest: int = 0,
        massive_least: float = LEAST,
        massive_ratio: float = RATIO,
    ) -> None:
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
            raise AttnlabError(f"The threshold of the sinks is a share of attention, 0 to 1; got {threshold!r}.")
        if not isinstance(k, list | tuple) or not all(type(n) is int and 1 <= n <= SINGLE for n in k):
            raise AttnlabError(f"The option 'k' is a list of positions from 1 to {SINGLE}; got {k!r}.")
        for name, number, least in (("sequences", sequences, 1), ("length", length, 2), ("largest", largest, 0)):
            check_whole(name, number, least)
        for name, limit in (("massive_least", massive_least), ("massive_ratio", massive_ratio)):
            check_number(name, limit, 0)
        check_yes_or_no("start", start)
        self.inputs = checked_inputs(inputs)
        self.sequences, self.length, self.start = sequences, length, start
        self.options = Options(float(threshold), tuple(k), largest, float(massive_least), float(massive_ratio))
        extra = own_metrics(self.inputs)
        states = {kind: SinkState(kind, heads, self.options, extra) for kind, heads in kinds_in_order(layout.heads)}
        super().__init__(layout, states)

    def own_sequences(self, model: Model, longest: int | None, seed: int) -> Sequences | None:
        """Random tokens and one token repeated, where they are asked for."""
        return own_tokens(
            model, self.inputs, longest, count=self.sequences, length=self.length, start=self.start, seed=seed
        )

    def needs(self, site: Site, batch: Batch) -> Needs | None:
        """Column sums in the second pass; `lse` brings the learned sink's share, and the sum of a sigmoid's row."""
        sigmoid = site.normalizer == "sigmoid"
        first = first_keys(site) if sigmoid else None
        if batch.own:
            return Needs(Emit(key_sum=True, visible=True, lse=sigmoid, columns=first))
        if NATURAL not in self.inputs:
            return None
        largest = self.options.largest or None
        emit = Emit(key_sum=True, key_square=True, visible=True, lse=True, columns=first, top_k=largest)
        return Needs(emit, qkv=True, hidden=site.kind != "cross")

    def update(self, call: Call, batch: Batch) -> None:
        """Takes in what one layer's keys receive, and what goes with it."""
        state = self._kinds[call.kind]
        if not batch.own:
            self.record(call, batch, state.update(call, self._ids(call.site, batch)))
            return
        values = {
            f"{metric}_{name}": part
            for metric, value in state.of_own(call).items()
            for name, part in by_input(value, batch.index, self.inputs, self.sequences).items()
        }
        state.take(call.layer, values)
        self.record(call, batch, values)

    def end_blocks(self, site: Site, hidden: Tensor, batch: Batch) -> None:
        """Takes in what left the last block."""
        self._kinds[site.kind].update_last(site, hidden, self._ids(site, batch))

    def _ids(self, site: Site, batch: Batch) -> Tensor | None:
        # Without ids of its own a decoder reads the text shifted by one: its tokens are not the encoder's.
        pair = "encoder" in self.layout.heads
        ids = batch.decoder_input_ids if pair and site.kind == "self" else batch.input_ids
        return ids if ids is not None and ids.shape == (site.batch, site.n_keys) else None

    def result(self) -> Result:
        """Sink metrics by head, alpha by position, the tokens that receive most, and massive activations."""
        kinds = self.seen_kinds()
        natural = [state for state in kinds if state.natural()]
        tables = [state.token_table(self.layout.tokens) for state in natural]
        massive = [state.hidden.table(state.kind, self.layout.tokens) for state in natural if state.hidden.seen()]
        several = len(kinds) > 1
        return Result(
            analysis=self.name,
            findings=tuple(line for state in kinds for line in findings(state, self.layout.tokens, several)),
            heads=heads_frame(row for state in kinds for row in state.head_rows()),
            table=pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(),
            arrays={name: array for state in natural for name, array in state.arrays().items()},
            more_tables={"massive": pd.concat(massive, ignore_index=True)} if massive else {},
            metrics={**METRICS, **own_metrics(self.inputs)},
        )

    @classmethod
    def figures(cls, result: Result) -> dict[str, go.Figure]:
        """Map of alpha_1, the strongest heads, alpha by position, the top positions and tokens, hidden states."""
        return sink_figures(result)

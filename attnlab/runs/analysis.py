"""What an analysis is: it declares what it needs of each attention call and keeps a mergeable state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self

import plotly.graph_objects as go
from attnlab_kernels import Emit
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.capture.call import Call, Kind, Site
from attnlab.results.result import Result

if TYPE_CHECKING:
    from attnlab.models import Model
    from attnlab.runs.by_sequence import BySequence
    from attnlab.runs.data import Sequences


@dataclass(frozen=True)
class Layout:
    """The attention heads of a model, as an analysis needs to know them.

    Attributes:
        model_name: what the user called the model.
        heads: number of query heads for each layer, by kind: `{"self": (12, 12, ...)}`.
        vocabulary: size of the vocabulary, None for a model without one.
        tokens: the text of each vocabulary entry (for display), or None without a tokenizer.
    """

    model_name: str
    heads: Mapping[Kind, tuple[int, ...]]
    vocabulary: int | None = None
    tokens: tuple[str, ...] | None = None


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of sequences as the model reads it.

    Attributes:
        index: [B] numbers of the sequences in the data set.
        input_ids: [B, N] token ids, padded on the right.
        attention_mask: [B, N] boolean, False for padding.
        decoder_input_ids, decoder_attention_mask: [B, M] likewise, for an encoder-decoder; else None.
        own: whether these are the `own_sequences` of the analysis that is asked, and not of the data.
    """

    index: tuple[int, ...]
    input_ids: Int[Tensor, "B N"]
    attention_mask: Bool[Tensor, "B N"]
    decoder_input_ids: Int[Tensor, "B M"] | None = None
    decoder_attention_mask: Bool[Tensor, "B M"] | None = None
    own: bool = False


@dataclass(frozen=True, eq=False)
class Needs:
    """What an analysis wants of one attention call.

    Attributes:
        emit: statistics of the attention.
        qkv: whether `Call.q`, `Call.k`, `Call.v` and `Call.z` are wanted.
        loss: whether `end_batch` must receive the next-token loss.
        hidden: whether `Call.hidden` is wanted, the residual stream that enters the block of the call, and after the
            forward a call of `end_blocks`. Of a torch module that is no model of transformers or TransformerLens it
            stays None, since which of its tensors that is is not known.
    """

    emit: Emit = field(default_factory=Emit)
    qkv: bool = False
    loss: bool = False
    hidden: bool = False


class Analysis(ABC):
    """A study that streams over attention calls.

    A fresh instance is made for every chunk of data; `state_dict` of each chunk is written to disk, and the states are
    merged in chunk order, so the same data gives the same bytes however it was computed. Keep float64 sums.

    What the constructor takes after `layout` are the analysis' options, each with a default: plain JSON values, which
    `run.json` records and `attnlab.analyze(model, data, analyses={"name": {"option": value}})` sets.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for `attnlab analyses` and `--help`."""
    kept: BySequence | None = None
    """Where `record` puts its values: set by the run, None where they are not kept."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    @classmethod
    def refusal(cls, layout: Layout) -> str | None:
        """Why this analysis does not fit a model, or None when it does."""
        return None

    def own_sequences(self, model: Model, longest: int | None, seed: int) -> Sequences | None:
        """Sequences that this analysis reads beside the data, such as random tokens repeated; None for none.

        They are read after the data, in batches that no other analysis sees and whose `own` is True. The same
        arguments must give the same sequences.

        Args:
            model: for its vocabulary and tokenizer.
            longest: most tokens in a sequence; None where nothing limits it.
            seed: of random numbers.
        """
        return None

    @abstractmethod
    def needs(self, site: Site, batch: Batch) -> Needs | None:
        """What to compute at `site`, or None for nothing."""

    @abstractmethod
    def update(self, call: Call, batch: Batch) -> None:
        """Take in one call; `call.emitted` holds exactly what `needs` asked for, probes as this analysis gave them."""

    def end_blocks(self, site: Site, hidden: Float[Tensor, "B N d"], batch: Batch) -> None:  # noqa: B027
        """Called after the forward for each kind of attention whose `hidden` was asked for, before `end_batch`.

        Args:
            site: of the last block's self-attention.
            hidden: what left that block.
            batch: that was read.
        """

    def end_batch(self, batch: Batch, loss: Float[Tensor, "B positions"] | None) -> None:  # noqa: B027
        """Called after the forward; `loss` [B, N-1] in nats where it was asked for, 0 at padding."""

    def record(self, call: Call, batch: Batch, values: Mapping[str, Float[Tensor, "B heads"]]) -> None:
        """Keeps the value of each metric for each sequence of the batch, which `attnlab.compare` resamples.

        Call it from `update` with what the means in `Result.heads` are taken over, under the same names; NaN where a
        sequence has no value. The run stores and merges these values by itself: they are no part of `state_dict`.
        """
        if self.kept is not None:
            self.kept.add(call.kind, call.layer, self.layout.heads[call.kind], batch.index, values)

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Add the state of the data that follows."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The whole state as tensors."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the state that `state_dict` gave."""

    @abstractmethod
    def result(self) -> Result:
        """The result of all data merged so far; its `metrics` say what the metrics of its heads are called."""

    @classmethod
    @abstractmethod
    def figures(cls, result: Result) -> dict[str, go.Figure]:
        """The plots of a result by name, the most telling one first; never shown, only returned."""

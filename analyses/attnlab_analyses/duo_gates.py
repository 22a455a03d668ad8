"""DuoAttention's gates, trained: which key heads need full attention to answer for passkeys (arXiv 2410.10819).

Every head's output becomes g * full + (1 - g) * streaming, with one gate for each key head, from 1. The loss is the
mean square of what that changes in the last hidden states, over the tokens of questions and answers, plus 0.05 times
the mean gate. As in the authors' training: AdamW without weight decay at 0.02, gates clamped to [0, 1] before each
step, a rate that rises over the first fifth of the steps and falls over the last (a tenth of it at least), one sequence
a step, 128 first and 256 recent tokens, 2000 steps. Their code takes `full` from the run without gates, layer by layer
(`full="original"`); the paper's formula reads as that of the gated stream itself (`full="own"`).

Nothing of the model is trained. Activations of all layers are kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from attnlab_kernels import Emit
from torch import Tensor

from attnlab.capture.call import Call
from attnlab.capture.session import capture
from attnlab.errors import AttnlabError
from attnlab.experiments import Context, Experiment
from attnlab.options import check_number, check_text, check_whole
from attnlab.plots import blank, head_map
from attnlab.results import Metric, NamedArray, Result, heads_frame
from attnlab_analyses.duo import Sizes, fitted, key_heads, write_full_attention_heads
from attnlab_analyses.duo_mixture import Gated
from attnlab_analyses.forwards import frozen, last_hidden
from attnlab_analyses.needles import Haystack, Prompt
from attnlab_analyses.passkeys import ORDINALS, Passkeys, Size

if TYPE_CHECKING:
    from attnlab.models import Model

METRICS = {
    "duo_gate": Metric(
        "DuoAttention's gate", "", "1 keeps full attention, 0 the first and the recent tokens", 0.0, 1.0
    ),
}
_LONGEST = 32000
_AT_ONCE = 50
"""Steps between two states that are kept on disk."""
_FULL = 0.5
"""A key head keeps full attention from this gate on."""
_TOLD = 8


@dataclass(frozen=True)
class DuoGates(Experiment):
    """A gate for each key head: 1 where it needs full attention, 0 where first and recent tokens are enough.

    Writes `full_attention_heads.tsv` and `config.json` as DuoAttention's tools read them.

    Attributes:
        steps: of training, each with one sequence.
        sink, recent: what a streaming head sees; made smaller where together they are more than a quarter of the
            longest sequence.
        rate, penalty: learning rate, and factor of the mean gate.
        passkeys, words: in a sequence, and in a passkey; fewer where the model takes too short sequences.
        shortest, longest: tokens of a sequence; what the model takes where that is less.
        announcement, question: texts before a passkey; random tokens for a model without a tokenizer. An empty question
            is the announcement again.
        values: "words" of the spelling alphabet, or ordinary "tokens".
        haystack: "data", or "random" for random ordinary tokens.
        full: "original" or "own", see the module.
        deployed_sink, deployed_recent: the sizes that `config.json` names, shrunk with the others.

    Example:
        >>> import attnlab
        >>> marks = {"announcement": "<needle>", "question": "<ask>", "values": "tokens", "haystack": "random"}
        >>> few = {"passkeys": 1, "words": 1, "shortest": 64, "longest": 64, "sink": 4, "recent": 12}
        >>> found = attnlab.experiment("known-circuit", DuoGates(steps=5, **marks, **few), ["any"])
        >>> found.arrays["gates"].values.shape
        (2, 8)
    """

    name: ClassVar[str] = "duo_gates"
    summary: ClassVar[str] = "DuoAttention: trains a gate for each key head between full attention and streaming"

    steps: int = 2000
    sink: int = 128
    recent: int = 256
    rate: float = 0.02
    penalty: float = 0.05
    passkeys: int = 10
    words: int = 32
    shortest: int = 1000
    longest: int = _LONGEST
    announcement: str = "Remember these words, the {ordinal} passkey to the vault: "
    question: str = "What is the {ordinal} passkey to the vault?\nPasskey: "
    values: str = "words"
    haystack: str = "data"
    full: str = "original"
    deployed_sink: int = 64
    deployed_recent: int = 256

    def __post_init__(self) -> None:
        whole = {"steps": 1, "sink": 0, "recent": 1, "passkeys": 1, "words": 1, "shortest": 2, "longest": 2}
        for name, least in {**whole, "deployed_sink": 0, "deployed_recent": 1}.items():
            check_whole(name, getattr(self, name), least)
        for name in ("announcement", "question"):
            check_text(name, getattr(self, name))
            try:
                getattr(self, name).format(ordinal=ORDINALS[0])
            except (LookupError, ValueError, AttributeError):
                raise AttnlabError(
                    f"The option {name} is {getattr(self, name)!r}; a text was expected in which {{ordinal}} alone "
                    "stands in braces."
                ) from None
        check_number("rate", self.rate, 0)
        check_number("penalty", self.penalty, 0)
        choices = {"values": ("words", "tokens"), "haystack": ("data", "random"), "full": ("original", "own")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise AttnlabError(
                    f"The option {name} is {getattr(self, name)!r}; {' or '.join(map(repr, allowed))} was expected."
                )
        if self.passkeys > len(ORDINALS) or self.shortest > self.longest:
            raise AttnlabError(
                f"There are at most {len(ORDINALS)} passkeys, in sequences from shortest to longest; got "
                f"passkeys={self.passkeys}, shortest={self.shortest}, longest={self.longest}."
            )

    def refusal(self, model: Model) -> str | None:
        """Gates are of a decoder whose layers have equally many key heads, as in DuoAttention's file."""
        if model.is_encoder_decoder or set(model.layout.heads) != {"self"}:
            return "gates are trained for models of causal self-attention alone."
        if not model.has_loss:
            return "it does not go on with a text."
        counts = set(key_heads(model))
        return None if len(counts) == 1 else f"its layers have different numbers of key heads ({sorted(counts)})."

    def run(self, context: Context) -> Result:
        """Trains the gates."""
        model = context.model
        hay = Haystack(model, context.sequences if self.haystack == "data" else None)
        passkeys = Passkeys(hay, self.announcement, self.question, self.values)
        longest = min(self.longest, model.max_length or self.longest)
        size = passkeys.fit(Size(self.passkeys, self.words, min(self.shortest, longest), longest))
        sizes = fitted(Sizes(self.sink, self.recent), longest, 0.25)
        state = _start(key_heads(model))
        losses = []
        for first in range(0, self.steps, _AT_ONCE):
            context.say("training steps", first, self.steps)
            last = min(first + _AT_ONCE, self.steps)

            def compute(state: _State = state, first: int = first, last: int = last) -> Mapping[str, Tensor]:
                return self._train(context, passkeys, size, sizes, state, range(first, last))

            found = context.step(f"steps-{first:06d}-{last:06d}", compute)
            state = _State(found["gates"], found["mean"], found["square"])
            losses.append(found["losses"])
        return self._result(model, state.gates.clamp(0, 1), torch.cat(losses), size, sizes)

    def _train(
        self, context: Context, passkeys: Passkeys, size: Size, sizes: Sizes, state: _State, steps: range
    ) -> dict[str, Tensor]:
        """Some steps on from a state; the sequence of a step follows from the seed and its number."""
        model = context.model
        gates = state.gates.to(model.device, copy=True).requires_grad_(True)
        optimizer = torch.optim.AdamW([gates], lr=self.rate, weight_decay=0.0)
        moments = {"exp_avg": state.mean.to(gates, copy=True), "exp_avg_sq": state.square.to(gates, copy=True)}
        optimizer.state[gates] = {"step": torch.tensor(float(steps.start)), **moments}
        losses = []
        with frozen(model.captured):
            for step in steps:
                with torch.no_grad():
                    gates.clamp_(0, 1)
                prompt = passkeys.draw(size, np.random.default_rng([context.seed, step]))
                distance = self.distance(model, prompt, gates, sizes)
                mean = gates.abs().mean()
                optimizer.zero_grad()
                (distance + self.penalty * mean).backward()
                for group in optimizer.param_groups:
                    group["lr"] = self.rate * warmth(step, self.steps)
                optimizer.step()
                losses.append([float(distance.detach()), float(mean.detach())])
        known = optimizer.state[gates]
        return {
            "gates": gates.detach().cpu(), "mean": known["exp_avg"].cpu(), "square": known["exp_avg_sq"].cpu(),
            "losses": torch.tensor(losses, dtype=torch.float64),
        }  # fmt: skip

    def distance(self, model: Model, prompt: Prompt, gates: Tensor, sizes: Sizes) -> Tensor:
        """Mean square of what gates change in the last hidden states, over the tokens of questions and answers.

        Args:
            model: with its weights frozen.
            prompt: the sequence.
            gates: [L, K].
            sizes: what a streaming head sees.

        Returns:
            A scalar, with gradients for the gates.
        """
        ids = torch.from_numpy(prompt.ids)[None].to(model.device)
        recorded: dict[int, Tensor] = {}

        def keep(call: Call) -> None:
            if call.z is not None:
                recorded[call.layer] = call.z

        original = self.full == "original"
        with torch.no_grad():
            if original:
                with capture(model, emit=Emit(), qkv=True, on_call=keep):
                    before = last_hidden(model, ids)
            else:
                before = last_hidden(model, ids)
        gated = Gated("all", gates, sizes, recorded if original else None)
        with torch.enable_grad(), capture(model, emit=_nothing, interventions=[gated]):
            after = last_hidden(model, ids)
        wide = torch.promote_types(after.dtype, torch.float32)
        return (before[0, prompt.asked :].to(wide) - after[0, prompt.asked :].to(wide)).square().mean()

    def _result(self, model: Model, gates: Tensor, losses: Tensor, size: Size, sizes: Sizes) -> Result:
        heads, keys = model.layout.heads["self"], key_heads(model)
        rows = [
            {
                "layer": i, "key_head": k, "gate": float(gates[i, k]), "full_attention": bool(gates[i, k] >= _FULL),
                "heads": ", ".join(f"L{i}H{h}" for h in range(k * heads[i] // n, (k + 1) * heads[i] // n)),
            }
            for i, n in enumerate(keys)
            for k in range(n)
        ]  # fmt: skip
        frame = heads_frame(
            (i, h, "self", "duo_gate", float(gates[i, h * keys[i] // n]), float("nan"), self.steps)
            for i, n in enumerate(heads)
            for h in range(n)
        )
        deployed = fitted(Sizes(self.deployed_sink, self.deployed_recent), size.longest, 0.25)
        steps: dict[str, list] = {"part": ["distance", "mean gate"]}
        about = "Of each step, before it was taken: the change of the hidden states, and the mean gate."
        arrays = {
            "gates": NamedArray(gates.numpy(), ("layer", "key_head"), {}, "", "Gates after training."),
            "losses": NamedArray(losses.numpy(), ("step", "part"), steps, "", about),
            "sizes": NamedArray(np.array(deployed), ("size",), {"size": list(Sizes._fields)}, "tokens", "Deployed."),
        }
        found = _findings(rows, losses, size, sizes)
        return Result(self.name, found, frame, pd.DataFrame(rows), arrays, metrics=METRICS)

    def write(self, result: Result, folder: Path) -> list[Path]:
        """DuoAttention's files."""
        sizes = Sizes(*(int(n) for n in result.arrays["sizes"].values))
        return write_full_attention_heads(folder, result.arrays["gates"].values, sizes)

    @classmethod
    def figures(cls, result: Result) -> dict[str, go.Figure]:
        """The map of the gates, and how training went."""
        losses = result.arrays["losses"].values
        figure = blank("Training of the gates", "at each step: change of the last hidden states, and the mean gate")
        for column, name in enumerate(("change of hidden states", "mean gate")):
            figure.add_trace(go.Scatter(y=losses[:, column].tolist(), name=name, mode="lines"))
        figure.update_xaxes(title="step")
        return {"duo_gate": head_map(result, "duo_gate"), "training": figure}


class _State(NamedTuple):
    """Gates and what AdamW remembers of their gradients, each [L, K]."""

    gates: Tensor
    mean: Tensor
    square: Tensor


def _start(keys: tuple[int, ...]) -> _State:
    shape = (len(keys), keys[0])
    return _State(torch.ones(shape), torch.zeros(shape), torch.zeros(shape))


def _nothing(_: object) -> None:
    return None


def warmth(step: int, steps: int) -> float:
    """Factor of the learning rate: up over the first fifth of the steps, down over the last, 0.1 at least.

    >>> [warmth(step, 100) for step in (0, 9, 50, 90, 99)]
    [0.1, 0.5, 1, 0.5, 0.1]
    """
    fifth = max(1, steps // 5)
    return min(1, max((step + 1) / fifth, 0.1), max((steps - step) / fifth, 0.1))


def _findings(rows: list[dict[str, object]], losses: Tensor, size: Size, sizes: Sizes) -> tuple[str, ...]:
    kept = sorted((row for row in rows if row["full_attention"]), key=lambda row: -float(row["gate"]))  # type: ignore[arg-type]
    listed = ", ".join(f"{row['heads']} ({row['gate']:.2f})" for row in kept[:_TOLD])
    more = f" and {len(kept) - _TOLD} more" if len(kept) > _TOLD else ""
    tail = losses[-max(1, len(losses) // 10) :].mean(0)
    return (
        f"{len(kept)} of {len(rows)} key heads keep full attention (gate of at least {_FULL:g})"
        f"{': ' if kept else ''}{listed}{more}.",
        f"The mean gate is {float(tail[1]):.2f}, and hidden states change by a mean square of {float(tail[0]):.3g}, "
        f"over the last tenth of {len(losses)} steps.",
        f"A sequence has {size.passkeys} passkeys of {size.words} words, in {size.shortest} to {size.longest} tokens; "
        f"streaming heads see {sizes}.",
    )

"""Retrieval heads: which heads look at a needle while the model says it (Wu et al., arXiv 2404.15574).

A needle of random words is hidden among the data's tokens, and asked for at the end. While the model says it, a token
is a hit of a head when the head's largest entry lies on the needle and on the very token that the model says; the score
is hits over the needle's length. As in the paper's code, prompts on which the model fails say nothing of its heads and
are left out. Largest entries are row statistics of the forward, so the cost grows as the model's own.

Two ways to let the model answer. `generate=False`: one forward with the needle as the answer, and a token counts where
the model's own most likely next token is the needle's. `generate=True`, as the paper: the model goes on with its own
tokens, each by a forward of its own, and a token counts where it is any of the needle's.

Shapes: P prompts, T tokens of a needle, L layers, H heads.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
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
from attnlab.options import check_number, check_text, check_whole, check_yes_or_no
from attnlab.plots import blank, head_map
from attnlab.plots.matrix import matrix_trace
from attnlab.results import Metric, NamedArray, Result, heads_frame
from attnlab.runs.data import Sequences
from attnlab_analyses.forwards import logits_at
from attnlab_analyses.moments import HeadMoments
from attnlab_analyses.needles import Haystack, Needle, Prompt, hide, overhead
from attnlab_analyses.sentences import heads_named

if TYPE_CHECKING:
    from attnlab.models import Model

METRICS = {
    "retrieval": Metric(
        "Retrieval", "", "share of a needle's tokens that the head looks at while they are said", 0.0, 1.0
    ),
}
_LONGEST = 4096
_KEY_TOKENS = 4
"""Tokens that announce a needle and ask for it, where there is no tokenizer to write them with."""
_TAIL = 16
"""Haystack that stands behind the deepest needle, so that no head finds it by looking at the tokens just before."""
_TOLD = 6


class Answers(NamedTuple):
    """What a model and its heads did on some prompts.

    Attributes:
        hits: [P, L, H] share of the needle's tokens; NaN for heads that a layer does not have.
        recall: [P] share of the needle's tokens that the model says.
    """

    hits: Tensor
    recall: Tensor


@dataclass(frozen=True)
class NeedleTest(Experiment):
    """The needle test over lengths and depths, with the score of every head.

    Attributes:
        lengths: tokens of a prompt with its answer; a quarter, half and all of what the model takes by default, of 4096
            at most.
        depths: where the needle stands, from 0 (the haystack's beginning) to 1 (16 tokens before its end).
        prompts: for each length and depth.
        needle_tokens: T, random words, or other ordinary tokens where the vocabulary has few words.
        announcement: text before the needle; random tokens for a model without a tokenizer.
        question: text that asks for it; the announcement again where it is empty, which any model that copies answers.
        haystack: "data", or "random" for random ordinary tokens.
        generate: whether the model goes on with its own tokens.
        threshold: score from which a head is a retrieval head.
        least_recall: prompts count where the model says more than this share of the needle.

    Example:
        >>> import attnlab
        >>> marks = {"announcement": "<needle>", "question": "<ask>", "needle_tokens": 1, "haystack": "random"}
        >>> found = attnlab.experiment("known-circuit", NeedleTest(lengths=(128,), prompts=2, **marks), ["any"])
        >>> print(found.findings[0])
        1 retrieval head of 16, with scores of at least 0.1: L1H2 (1.00).
    """

    name: ClassVar[str] = "needle"
    summary: ClassVar[str] = "retrieval heads: who looks at the needle in a haystack, over lengths and depths"

    lengths: tuple[int, ...] | list[int] = ()
    depths: tuple[float, ...] | list[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
    prompts: int = 4
    needle_tokens: int = 8
    announcement: str = "\nThe secret words are:"
    question: str = ""
    haystack: str = "data"
    generate: bool = False
    threshold: float = 0.1
    least_recall: float = 0.5

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("needle_tokens", 1)):
            check_whole(name, getattr(self, name), least)
        for name in ("announcement", "question"):
            check_text(name, getattr(self, name))
        check_yes_or_no("generate", self.generate)
        check_number("threshold", self.threshold, 0, 1)
        check_number("least_recall", self.least_recall, 0, 1)
        for name, values in (("lengths", self.lengths), ("depths", self.depths)):
            if not isinstance(values, list | tuple) or any(value in values[:i] for i, value in enumerate(values)):
                raise AttnlabError(f"The option {name} is {values!r}; a list of different numbers was expected.")
        for length in self.lengths:
            check_whole("lengths", length, 4)
        if not self.depths:
            raise AttnlabError("The option depths is empty; at least one number from 0 to 1 was expected.")
        for depth in self.depths:
            check_number("depths", depth, 0, 1)
        if self.haystack not in ("data", "random"):
            raise AttnlabError(f"The option haystack is {self.haystack!r}; 'data' or 'random' was expected.")

    def refusal(self, model: Model) -> str | None:
        """A model has to say the needle, token by token."""
        return None if model.has_loss and not model.is_encoder_decoder else "it does not go on with a text."

    def run(self, context: Context) -> Result:
        """Asks for each needle, and counts what each head looked at."""
        model = context.model
        hay = Haystack(model, context.sequences if self.haystack == "data" else None)
        lengths = tuple(self.lengths) or _lengths_of(model)
        for length in lengths:
            if model.max_length is not None and length > model.max_length:
                raise AttnlabError(
                    f"The option lengths has {length}, but {model.name} takes {model.max_length} tokens."
                )
        cells: dict[tuple[int, float], Answers] = {}
        total = len(lengths) * len(self.depths)
        for n, depth in itertools.product(lengths, self.depths):
            context.say("needles", len(cells), total)

            def compute(n: int = n, depth: float = depth) -> dict[str, Tensor]:
                return self._cell(context, hay, n, depth)._asdict()

            cells[n, depth] = Answers(**context.step(f"tokens-{n}-depth-{depth:g}", compute))
        return self._result(model, cells, lengths)

    def _cell(self, context: Context, hay: Haystack, length: int, depth: float) -> Answers:
        """All prompts of one length and depth."""
        rng = np.random.default_rng([context.seed, length, round(depth * 10**6)])
        made = [self._prompt(hay, length, depth, rng) for _ in range(self.prompts)]
        batches = context.batches(Sequences("needles", tuple(prompt.ids for prompt in made)))
        several = [self.ask(context.model, batch.input_ids, made[0]) for batch in batches]
        return Answers(*(torch.cat(part) for part in zip(*several, strict=True)))

    def _prompt(self, hay: Haystack, length: int, depth: float, rng: np.random.Generator) -> Prompt:
        value = hay.value(self.needle_tokens, rng)
        if hay.has_tokenizer:
            announcement = hay.encode(self.announcement)
            question = hay.encode(self.question) if self.question else announcement
        else:
            announcement = question = hay.value(_KEY_TOKENS, rng)
        needle = [Needle(announcement, value, question)]
        room = length - overhead(needle, hay.start)
        if room < 1:
            raise AttnlabError(
                f"A needle of {self.needle_tokens} tokens with its question takes {length - room} tokens, so {length} "
                "leave no haystack; give a greater length, fewer needle_tokens or a shorter announcement."
            )
        share = (room - min(_TAIL, room // 4)) / room
        return hide(hay.draw(room, rng), needle, [depth * share], start=hay.start)

    @torch.no_grad()
    def ask(self, model: Model, ids: Tensor, layout: Prompt) -> Answers:
        """Lets the model answer, and looks where its heads look.

        Args:
            model: of causal self-attention.
            ids: [P, N] prompts of one layout, with their answers.
            layout: where needle and answer are.
        """
        needle, answer = layout.needles[0], layout.answers[0]
        wanted = ids[:, answer.start : answer.stop]
        if not self.generate:
            rows = torch.arange(answer.start - 1, answer.stop - 1, device=ids.device)
            said, looked = _say(model, ids[:, :-1], rows)
            right = said == wanted
            return self._answers(ids, needle, said, looked, right, right)
        known, tokens, places = ids[:, : answer.start], [], []
        for _ in range(self.needle_tokens):
            last = torch.tensor([known.shape[1] - 1], device=ids.device)
            said, looked = _say(model, known, last)
            known = torch.cat([known, said], 1)
            tokens.append(said)
            places.append(looked)
        said = torch.cat(tokens, 1)
        found = (wanted[:, :, None] == said[:, None]).any(2)
        return self._answers(ids, needle, said, torch.cat(places, -1), torch.ones_like(said, dtype=torch.bool), found)

    def _answers(
        self, ids: Tensor, needle: range, said: Tensor, looked: Tensor, counts: Tensor, found: Tensor
    ) -> Answers:
        """From what the model said [B, T] and where heads looked [B, L, H, T], -1 for heads that are not there."""
        inside = (looked >= needle.start) & (looked < needle.stop)
        there = ids[:, None, None].expand(*looked.shape[:3], -1).gather(-1, looked.clamp(min=0))
        hits = (inside & (there == said[:, None, None]) & counts[:, None, None]).double().mean(-1)
        hits = hits.masked_fill((looked < 0).all(-1), torch.nan)
        return Answers(hits.cpu(), found.double().mean(-1).cpu())

    def _result(self, model: Model, cells: dict[tuple[int, float], Answers], lengths: Sequence[int]) -> Result:
        heads = model.layout.heads["self"]
        score = HeadMoments(heads)
        shape = (len(lengths), len(self.depths))
        by_cell = np.full((*shape, len(heads), max(heads)), np.nan)
        rows = []
        for number, ((length, depth), answers) in enumerate(cells.items()):
            solved = answers.recall > self.least_recall
            hits = answers.hits[solved]
            for layer, n in enumerate(heads):
                score.add(layer, hits[:, layer, :n])
            if len(hits):
                by_cell[np.unravel_index(number, shape)] = hits.mean(0).numpy()
            rows.append(
                {
                    "length": length, "depth": depth, "prompts": len(solved), "recall": float(answers.recall.mean()),
                    "solved": float(solved.double().mean()), **_best(hits),
                }
            )  # fmt: skip
        table = pd.DataFrame(rows)
        axes = ("length", "depth", "layer", "head")
        labels: dict[str, list] = {"length": list(lengths), "depth": list(self.depths)}
        about = "Mean over the prompts that count; NaN where the model solves none."
        arrays = {"retrieval": NamedArray(by_cell, axes, labels, "of the needle", about)}
        frame = heads_frame(
            (i, j, "self", "retrieval", float(score.mean[i, j]), float(score.stderr()[i, j]), int(score.count[i, j]))
            for i, j in heads_named(heads)
            if score.count[i, j] > 0
        )
        return Result(self.name, self._findings(score, heads, table), frame, table, arrays, metrics=METRICS)

    def _findings(self, score: HeadMoments, heads: Sequence[int], table: pd.DataFrame) -> tuple[str, ...]:
        said = f"The model says {table['recall'].mean():.0%} of the needles' tokens"
        ends = table.loc[[table["recall"].idxmin(), table["recall"].idxmax()]]
        span = " and ".join(f"{r.recall:.0%} at {r.length} tokens, depth {r.depth:g}" for r in ends.itertuples())
        where = f"between {span}" if table["recall"].nunique() > 1 else "as many at every length and depth"
        way = "its own text so far" if self.generate else "the needle's tokens so far"
        success = f"{said}, given {way}; {where}."
        if not bool((score.count > 0).any()):
            return (f"The model finds no needle, so no head has a retrieval score. {success}",)
        named = heads_named(heads)
        holders = [(float(score.mean[place]), name) for place, name in named.items()]
        holders = sorted((v for v in holders if v[0] >= self.threshold), key=lambda item: -item[0])
        listed = ", ".join(f"{name} ({value:.2f})" for value, name in holders[:_TOLD])
        more = f" and {len(holders) - _TOLD} more" if len(holders) > _TOLD else ""
        noun = "head" if len(holders) == 1 else "heads"
        count = len(holders) or "No"
        names = f": {listed}{more}." if holders else "."
        return (f"{count} retrieval {noun} of {len(named)}, with scores of at least {self.threshold:g}{names}", success)

    @classmethod
    def figures(cls, result: Result) -> dict[str, go.Figure]:
        """The map of the scores, and the model's own success over lengths and depths."""
        found = {"retrieval": head_map(result, "retrieval")} if len(result.heads) else {}
        grid = result.table.pivot(index="depth", columns="length", values="recall")
        figure = blank("Needles found", "share of the needle's tokens that the model says, by length and depth")
        trace = matrix_trace(grid.to_numpy(dtype=float), hover="depth %{y}, %{x} tokens")
        trace.update(x=[f"{n}" for n in grid.columns], y=[f"{d:g}" for d in grid.index], zmin=0.0, zmax=1.0)
        figure.add_trace(trace)
        figure.update_xaxes(title="tokens", type="category", showgrid=False)
        figure.update_yaxes(title="depth", type="category", autorange="reversed", showgrid=False)
        return found | {"success": figure}


def _lengths_of(model: Model) -> tuple[int, ...]:
    longest = min(model.max_length or _LONGEST, _LONGEST)
    return tuple(dict.fromkeys((longest // 4, longest // 2, longest)))


def _say(model: Model, ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely tokens [B, T] after some rows, and there each head's most attended key [B, L, H, T]."""
    heads = model.layout.heads["self"]
    looked = torch.full((len(ids), len(heads), max(heads), len(rows)), -1, device=ids.device)

    def keep(call: Call) -> None:
        if call.emitted.argmax is not None:
            looked[:, call.layer, : call.site.n_heads] = call.emitted.argmax[..., rows].to(ids.device)

    emit = Emit(argmax=True)
    with capture(model, emit=lambda site: emit if site.kind == "self" else None, on_call=keep):
        said = logits_at(model, ids, rows).argmax(-1)
    return said, looked


def _best(hits: Tensor) -> dict[str, object]:
    """The head with the largest mean score in a cell."""
    if not len(hits):
        return {"best": "", "best_score": np.nan}
    mean = hits.mean(0).nan_to_num(-1.0)
    layer, head = divmod(int(mean.argmax()), mean.shape[1])
    return {"best": f"L{layer}H{head}", "best_score": float(mean.max())}

"""Visual sinks and image-centric heads of a vision-language model, and what redistributing the sinks' mass does.

Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models" (VAR, arXiv 2503.03321);
`visual_redistribution` has the definitions and says where the published code differs. The rows that count are those of
the text after the image. The sink features are given, or found: those in which the first token of a text has a massive
activation (`massive`). Sinks are told, as the model runs, from what enters each layer; in the last layer nothing is
redistributed.

Where the image tokens that hold the answer are known, as in grids of digits, each head's attention to them from the
last token of the question is reported too. All masses are key probes: no attention matrix is formed.

Shapes: B questions of a batch, E of all, N tokens, T of an answer, L layers, H heads, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from attnlab_kernels import Emit
from torch import Tensor

from attnlab.capture.blocks import following
from attnlab.capture.call import Call, Site
from attnlab.capture.session import capture
from attnlab.errors import AttnlabError
from attnlab.experiments.base import Experiment
from attnlab.experiments.context import Context
from attnlab.options import check_number, check_whole
from attnlab.plots import PALETTE, blank, head_map
from attnlab.results import Metric, NamedArray, Result, heads_frame
from attnlab_analyses.massive import LEAST, RATIO, massive
from attnlab_analyses.moments import HeadMoments
from attnlab_analyses.rows import mean_over_rows
from attnlab_analyses.sentences import heads_named
from attnlab_analyses.visual_findings import about_answers, about_heads, about_sinks
from attnlab_analyses.visual_questions import Questions, digest_of, file_questions, grid_questions
from attnlab_analyses.visual_redistribution import RHO, SHARE, TAU, VISUAL, RedistributeVisualSinks, Rule

if TYPE_CHECKING:
    from attnlab.models import Model

METRICS = {
    "visual_mass": Metric("Weight on the image", "", "mean over the text rows after the image", 0.0, 1.0),
    "visual_off_sink": Metric(
        "Off the visual sinks", "", "share of the weight on the image that is on tokens that are no sinks", 0.0, 1.0
    ),
    "image_centric": Metric("Image-centric rows", "", "share of the text rows after the image", 0.0, 1.0),
    "gold_mass": Metric(
        "Weight on the answer", "", "from the question's last token to the image tokens that hold the answer", 0.0, 1.0
    ),
}
_BATCH = 32


@dataclass(frozen=True)
class VisualSinks(Experiment):
    """Which image tokens are sinks, which heads look at the rest of the image, and the answers when they do so more.

    Attributes:
        path: file of questions, one JSON object in a line with `image`, `text` and maybe `answer`; empty for questions
            about grids of digits, for a model that knows their words.
        questions: how many, at most.
        sink_features: numbers of the features; found where none are given.
        tau: least phi of a sink.
        visual, rho: a row is image-centric with at least `visual` of its weight on the image, and `rho` of that off the
            sinks.
        share: p, of the sinks' mass that is redistributed.
        text_sinks: whether sinks of the text give to the image too, as in the published code.
        massive_least, massive_ratio: both thresholds by which sink features are found.

    Example:
        >>> VisualSinks(sink_features=[1415, 2533]).rho
        0.8
    """

    name: ClassVar[str] = "visual_sinks"
    summary: ClassVar[str] = "visual sinks and image-centric heads of a vision-language model, and redistribution (VAR)"
    reads_data: ClassVar[bool] = False

    path: str = ""
    questions: int = 128
    sink_features: Sequence[int] = ()
    tau: float = TAU
    visual: float = VISUAL
    rho: float = RHO
    share: float = SHARE
    text_sinks: bool = False
    massive_least: float = LEAST
    massive_ratio: float = RATIO

    def __post_init__(self) -> None:
        check_whole("questions", self.questions, 1)
        for name in ("tau", "massive_least", "massive_ratio"):
            check_number(name, getattr(self, name), 0)
        for name in ("visual", "rho", "share"):
            check_number(name, getattr(self, name), 0, 1)
        if not isinstance(self.path, str):
            raise AttnlabError(f"The option path is {self.path!r}; a path as text was expected.")
        if not isinstance(self.text_sinks, bool):
            raise AttnlabError(f"The option text_sinks is {self.text_sinks!r}; true or false was expected.")
        if not isinstance(self.sink_features, list | tuple):
            raise AttnlabError(f"The option sink_features is {self.sink_features!r}; a list of numbers was expected.")
        for feature in self.sink_features:
            check_whole("sink_features", feature, 0)

    def refusal(self, model: Model) -> str | None:
        """It needs image tokens in a text that goes on, and softmax attention."""
        names = ("image_token_id", "image_token_index")
        config = getattr(model.hf, "config", None)
        if not model.has_loss or not any(isinstance(getattr(config, name, None), int) for name in names):
            return "it is no vision-language model that reads image tokens in its text."
        if any(site.kind == "self" and site.normalizer != "softmax" for site in model.sites):
            return "its attention is no softmax, so that a row cannot give mass away and add up to 1."
        return None

    def run(self, context: Context) -> Result:
        """Finds the sink features, measures every head, and answers with and without redistribution."""
        model = context.model
        given = tuple(self.sink_features)
        width = int(model.config.get_text_config(decoder=True).hidden_size)
        if any(feature >= width for feature in given):
            raise AttnlabError(
                f"The option sink_features has {max(given)}, but hidden states of {model.name} have {width}."
            )
        # A folder in which the file has changed since has other steps.
        of = f"-{digest_of(Path(self.path), self.questions)[:16]}" if self.path else ""
        features = given or tuple(context.step(f"features{of}", lambda: self._features(context))["features"].tolist())
        rule = Rule(features, self.tau, self.visual, self.rho, self.text_sinks)
        whole = context.step(f"whole{of}", lambda: self._measure(context, rule))
        edited = None
        if bool(whole["giving"][:-1].any()):
            edited = context.step(f"redistributed{of}", lambda: self._redistributed(context, rule))
        return self._result(model, rule, whole, edited)

    def _questions(self, context: Context) -> Iterator[Questions]:
        if self.path:
            return file_questions(context.model, Path(self.path), self.questions)
        return grid_questions(context.model, self.questions, context.seed, context.batch_size or _BATCH)

    @torch.no_grad()
    def _features(self, context: Context) -> dict[str, Tensor]:
        """The features in which first tokens have massive activations, in any layer."""
        found: set[int] = set()

        def note(call: Call) -> None:
            if call.hidden is not None:
                there = massive(call.hidden, call.site.query_mask, least=self.massive_least, ratio=self.massive_ratio)
                found.update(there.feature[there.token == 0].tolist())

        for asked in self._questions(context):
            with capture(context.model, emit=_of_text(Emit()), hidden=lambda site: site.kind == "self", on_call=note):
                _logits(context.model, asked)
        return {"features": torch.tensor(sorted(found), dtype=torch.int64)}

    @torch.no_grad()
    def _measure(self, context: Context, rule: Rule) -> dict[str, Tensor]:
        """The masses of every head, the number of sinks of every layer, and the answers."""
        model = context.model
        heads = model.layout.heads["self"]
        moments = {metric: HeadMoments(heads) for metric in METRICS}
        counts: list[list[Tensor]] = [[] for _ in heads]
        giving = torch.zeros(len(heads), dtype=torch.int64)
        answers: list[dict[str, Tensor]] = []
        for number, asked in enumerate(self._questions(context)):
            context.say("questions", number, self.questions)
            with following(model.captured) as blocks:

                def emit(site: Site, asked: Questions = asked) -> Emit | None:
                    if site.kind != "self":
                        return None
                    tokens = rule.tokens(site, blocks.hidden(site))
                    gold = torch.zeros_like(tokens.image) if asked.gold is None else asked.gold.to(site.device)
                    columns = [tokens.sinks & tokens.image, tokens.others, gold]
                    return Emit(key_probes=torch.stack(columns, -1).to(torch.promote_types(model.dtype, torch.float32)))

                def take(call: Call, asked: Questions = asked) -> None:
                    tokens = rule.tokens(call.site, blocks.hidden(call.site))
                    for metric, value in _of_heads(call, tokens.rows, rule, asked).items():
                        moments[metric].add(call.layer, value)
                    counts[call.layer].append((tokens.sinks & tokens.image).sum(1).double().cpu())
                    giving[call.layer] += tokens.sinks.sum().cpu()

                with capture(model, emit=emit, on_call=take):
                    answers.append(_scored(_logits(model, asked), asked))
        sinks = torch.stack([torch.cat(several).mean() for several in counts])
        state = {name: part for metric, m in moments.items() for name, part in m.state_dict(metric).items()}
        return {"sinks": sinks, "giving": giving, **_together(answers), **state}

    @torch.no_grad()
    def _redistributed(self, context: Context, rule: Rule) -> dict[str, Tensor]:
        """The answers with the sinks' mass redistributed, and how many rows were changed."""
        model = context.model
        layers = range(len(model.layout.heads["self"]) - 1)
        answers, changed = [], torch.zeros((), dtype=torch.int64)
        for asked in self._questions(context):
            with following(model.captured) as blocks:
                edit = RedistributeVisualSinks([f"L{n}" for n in layers], rule=rule, blocks=blocks, share=self.share)
                with capture(model, emit=lambda site: None, interventions=[edit]):
                    answers.append(_scored(_logits(model, asked), asked))
            changed += sum(edit.changed.values())
        return {"changed": changed, **_together(answers)}

    def _result(
        self, model: Model, rule: Rule, whole: Mapping[str, Tensor], edited: Mapping[str, Tensor] | None
    ) -> Result:
        heads = model.layout.heads["self"]
        moments = {metric: HeadMoments(heads) for metric in METRICS}
        for metric, m in moments.items():
            m.load_state_dict(whole, metric)
        frame = heads_frame(
            (i, j, "self", metric, float(m.mean[i, j]), float(m.stderr()[i, j]), int(m.count[i, j]))
            for metric, m in moments.items()
            for i, j in heads_named(heads)
            if m.count[i, j] > 0
        )
        table = _table(whole, edited)
        about = "Visual sinks of a picture, the mean over questions."
        arrays = {
            "visual_sinks": NamedArray(whole["sinks"].numpy(), ("layer",), {}, "tokens", about),
            "sink_features": NamedArray(np.array(rule.features, dtype=np.int64), ("place",), {}, "", "Their numbers."),
        }
        how = "given" if self.sink_features else "massive at first tokens"
        changed = 0 if edited is None else int(edited["changed"])
        said = (
            about_sinks(rule, whole["sinks"], how), *about_heads(moments, heads, rule),
            about_answers(table, self.share, changed),
        )  # fmt: skip
        return Result(self.name, said, frame, table, arrays, metrics=METRICS)

    @classmethod
    def figures(cls, result: Result) -> dict[str, go.Figure]:
        """A map of the heads for each metric, and the visual sinks of each layer."""
        found = {str(m): head_map(result, str(m)) for m in dict.fromkeys(result.heads["metric"])}
        sinks = result.arrays["visual_sinks"].values
        figure = blank("Visual sinks", "image tokens that are sinks at the input of a layer, mean over questions")
        figure.add_trace(go.Bar(x=np.arange(len(sinks)), y=sinks, marker={"color": PALETTE[0], "line": {"width": 0}}))
        figure.update_xaxes(title="layer", type="category", showgrid=False)
        figure.update_yaxes(title="tokens of a picture")
        return found | {"sinks": figure}


def _of_text(emit: Emit) -> Any:
    return lambda site: emit if site.kind == "self" else None


def _of_heads(call: Call, rows: Tensor, rule: Rule, asked: Questions) -> dict[str, Tensor]:
    """The metrics of a layer, [B, H]; NaN where a question has no such row."""
    masses = call.emitted.key_probes
    assert masses is not None
    on_sinks, on_others, on_gold = masses.double().unbind(-1)
    every = rows[:, None].expand(on_sinks.shape)
    looking = every & (on_sinks + on_others >= rule.visual)
    off = on_others / (on_sinks + on_others).clamp(min=torch.finfo(torch.float64).tiny)
    found = {
        "visual_mass": mean_over_rows(on_sinks + on_others, every),
        "visual_off_sink": mean_over_rows(off, looking),
        "image_centric": mean_over_rows(rule.centric(on_sinks, on_others, rows).double(), every),
    }
    if asked.gold is not None and asked.rows.shape[1]:
        last = asked.rows[:, :1, None].to(on_gold.device).transpose(1, 2).expand(-1, on_gold.shape[1], -1)
        found["gold_mass"] = on_gold.gather(2, last)[..., 0]
    return found


def _logits(model: Model, asked: Questions) -> Tensor:
    """[B, T, V] logits of each token of the answers."""
    inputs = {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for name, value in asked.inputs.items()
    }
    logits: Tensor = model.hf(**inputs, use_cache=False).logits
    rows = asked.rows.to(logits.device)
    return logits[torch.arange(len(rows), device=logits.device)[:, None], rows]


def _scored(logits: Tensor, asked: Questions) -> dict[str, Tensor]:
    """Of each question the mean loss of its answer's tokens, and whether all are the likeliest; NaN without answer."""
    answers = asked.answers.to(logits.device)
    if not answers.shape[1]:
        nothing = torch.full((len(answers),), torch.nan, dtype=torch.float64)
        return {"loss": nothing, "right": nothing}
    loss = -logits.double().log_softmax(-1).gather(-1, answers[..., None])[..., 0]
    return {"loss": loss.mean(1).cpu(), "right": (logits.argmax(-1) == answers).all(1).double().cpu()}


def _together(answers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    if not answers:
        raise AttnlabError("There are no questions; the file is empty.")
    return {name: torch.cat([several[name] for several in answers]) for name in ("loss", "right")}


def _table(whole: Mapping[str, Tensor], edited: Mapping[str, Tensor] | None) -> pd.DataFrame:
    there = ~whole["loss"].isnan()
    n = int(there.sum())
    rows = []
    for condition, found in (("whole", whole), ("redistributed", edited)):
        if found is None or not n:
            continue
        change = (found["loss"] - whole["loss"])[there]
        right = found["right"][there]
        rows.append(
            {
                "condition": condition, "loss": float(found["loss"][there].mean()), "loss_change": float(change.mean()),
                "stderr": float(change.std() / n**0.5) if n > 1 else math.nan, "accuracy": float(right.mean()),
                "accuracy_change": float((right - whole["right"][there]).mean()), "n": n,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)

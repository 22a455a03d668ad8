"""The parts of the report: what was run, what was found, each analysis, the texts."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from attnlab.report.figures import figure_html, maps_html, own_figures
from attnlab.report.tables import table_html
from attnlab.results.result import Result
from attnlab.view.reading import beginning

if TYPE_CHECKING:
    from attnlab.models import Model
    from attnlab.runs.run import Run

TEXTS = 3
_TEXT_TOKENS = 96
_FIRST_TEXT_BYTES = 4_000_000
_MORE_TEXT_BYTES = 1_000_000


def header(run: Run) -> str:
    """What was run on what, and how it went."""
    context, performance, config = run.context, run.performance, run.config
    data = config.get("data", {})
    facts = [
        ("sequences", _count(data.get("sequences"))),
        ("tokens", _count(data.get("tokens"))),
        ("tokens a second", _count(performance.get("tokens_per_second"))),
        ("seconds", _number(performance.get("seconds"))),
        ("peak memory", _bytes(performance.get("peak_memory_bytes"))),
        ("peak GPU memory", _bytes(performance.get("peak_gpu_memory_bytes"))),
        ("heads", _count(_number_of_heads(run))),
    ]
    cards = "".join(
        f'<div class="fact"><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>'
        for name, value in facts
        if value
    )
    made = datetime.now().astimezone().strftime("%d %B %Y, %H:%M")
    computed = " · ".join(
        html.escape(str(part))
        for part in (
            config.get("device"),
            config.get("dtype"),
            f"{config.get('backend')} backend",
            context.get("device_name"),
        )
        if part
    )
    return (
        '<header class="hero"><p class="kicker">attention report</p>'
        f"<h1>{html.escape(str(context.get('model', 'model')))}</h1>"
        f'<p class="lead">on <b>{html.escape(str(context.get("data", "data")))}</b></p>'
        f'<p class="soft">{computed} · {html.escape(made)}</p><dl class="facts">{cards}</dl></header>'
    )


def findings(run: Run) -> str:
    """What each analysis found, in plain sentences, and what there was to say about the data."""
    blocks = "".join(
        f'<div class="card finding"><h3><a href="#{_id(name)}">{html.escape(_title(name))}</a></h3><ul>'
        + "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
        + "</ul></div>"
        for name, sentences in ((name, result.findings) for name, result in run.results.items())
        if sentences
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in run.notes)
    noted = f'<div class="card notes"><h3>About the data</h3><ul>{notes}</ul></div>' if notes else ""
    return section("findings", "Findings", f'<div class="grid">{blocks}{noted}</div>')


def maps(run: Run) -> str:
    """The layer x head maps of every metric."""
    if not len(run.heads):
        return ""
    hint = (
        '<p class="hint">One cell for each head: the mean over sequences. Point at a cell for its value, standard '
        "error and number of sequences.</p>"
    )
    return section("maps", "Layer × head", hint + maps_html(run))


def texts(model: Model | None, sequences: Sequence[Sequence[int]], targets: Sequence[Sequence[int]] | None) -> str:
    """One head on one text, for the first few texts."""
    if model is None or not len(sequences):
        return ""
    views = []
    for i, ids in enumerate(sequences[:TEXTS]):
        target = targets[i] if targets is not None else None
        room = _FIRST_TEXT_BYTES if i == 0 else _MORE_TEXT_BYTES
        view = beginning(model, ids, target, max_tokens=_TEXT_TOKENS, most_bytes=room)
        views.append(view.fragment(f"text-{i}", with_assets=i == 0))
    buttons = "".join(
        f'<button type="button" data-text="{i}" aria-pressed="{str(i == 0).lower()}">text {i + 1}</button>'
        for i in range(len(views))
    )
    choice = f'<div class="pills" role="group" aria-label="Text">{buttons}</div>' if len(views) > 1 else ""
    shown = "".join(
        f'<div class="text" data-text="{i}"{"" if i == 0 else " hidden"}>{v}</div>' for i, v in enumerate(views)
    )
    hint = '<p class="hint">Choose a head and a token: the others are coloured by its attention.</p>'
    return section("text", "One head on one text", hint + choice + shown)


def analysis(result: Result) -> str:
    """The figures and the table of one analysis."""
    figures = own_figures(result.figures(), set(result.heads["metric"]))
    name = _id(result.analysis)
    drawn = "".join(figure_html(figure, f"{name}-{i}") for i, figure in enumerate(figures.values()))
    table = "".join(
        f'<details class="card" open><summary>{html.escape(title)}</summary>{table_html(frame)}</details>'
        for title, frame in [("Table", result.table), *((_title(k), v) for k, v in result.more_tables.items())]
        if len(frame)
    )
    return section(name, _title(result.analysis), f'<div class="plots">{drawn}</div>{table}')


def footer(run: Run) -> str:
    """The resolved configuration, whole."""
    text = json.dumps(
        {"config": run.config, "context": run.context, "performance": run.performance}, indent=2, default=str
    )
    where = f"<p>Tables and arrays: <code>{html.escape(str(run.path))}</code></p>" if run.path is not None else ""
    return (
        f'<footer><details class="card"><summary>Configuration</summary>{where}'
        f'<pre tabindex="0">{html.escape(text)}</pre>'
        '</details><p class="soft">Made by attnlab. Weights are exact; no attention matrix was formed.</p></footer>'
    )


def navigation(run: Run, with_text: bool) -> str:
    """Links to the sections."""
    names = [("findings", "Findings"), ("maps", "Layer × head")]
    names += [("text", "Text")] if with_text else []
    names += [(_id(name), _title(name)) for name in run.results]
    links = "".join(f'<a href="#{html.escape(i)}">{html.escape(label)}</a>' for i, label in names)
    return f'<nav aria-label="Sections"><span class="mark">attnlab</span>{links}</nav>'


def section(identifier: str, title: str, content: str) -> str:
    """A section with its heading."""
    return f'<section id="{html.escape(identifier, quote=True)}"><h2>{html.escape(title)}</h2>{content}</section>'


def _id(name: str) -> str:
    return "analysis-" + "".join(c if c.isalnum() else "-" for c in name)


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _number_of_heads(run: Run) -> int:
    return len(run.heads[["kind", "layer", "head"]].drop_duplicates())


def _count(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) else ""


def _number(value: Any) -> str:
    return f"{value:,.1f}" if isinstance(value, int | float) else ""


def _bytes(value: Any) -> str:
    if not isinstance(value, int | float):
        return ""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"

"""A comparison on disk: one HTML file that opens offline, in the look of a run's report, and the table as parquet."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attnlab.errors import RunFolderError
from attnlab.plots.metrics import describe
from attnlab.report.figures import chosen_html
from attnlab.report.page import document
from attnlab.report.sections import section
from attnlab.report.tables import table_html
from attnlab.results.storage import encode_table
from attnlab.runs.store import one_sentence_for_disk_errors, write_atomically

if TYPE_CHECKING:
    import pandas as pd

    from attnlab.compare.comparison import Comparison
    from attnlab.runs.run import Run

PAGE = "compare.html"
TABLE = "tables/compare.parquet"
_MOST_ROWS = 200


def check_folder(folder: Path) -> None:
    """Refuses a folder that a comparison would not be written into, before anything is computed.

    Raises:
        RunFolderError: it is a run's, or a file.
    """
    if (folder / "run.json").exists():
        raise RunFolderError(f"{folder} is the folder of a run; give another one for the comparison.")
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file; give a folder for the comparison.")


def save_comparison(comparison: Comparison, folder: Path) -> Path:
    """Writes the page and the table into a folder, which is made; the page's path.

    Raises:
        RunFolderError: the folder is a run's, or cannot be written.
    """
    check_folder(folder)
    with one_sentence_for_disk_errors(folder):
        (folder / TABLE).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / TABLE, encode_table(comparison.table))
    # Names of files may hold bytes that are no text.
    write_atomically(folder / PAGE, comparison_html(comparison).encode(errors="replace"))
    return folder / PAGE


def comparison_html(comparison: Comparison) -> str:
    """The page as text; names of models and data are escaped."""
    links = (("findings", "Findings"), ("runs", "The two runs"), ("differences", "Differences"), ("table", "Table"))
    navigation = "".join(f'<a href="#{identifier}">{title}</a>' for identifier, title in links)
    parts = [
        f'<nav aria-label="Sections"><span class="mark">attnlab</span>{navigation}</nav>',
        "<main>",
        _header(comparison),
        _findings(comparison),
        section("runs", "The two runs", f'<div class="card">{table_html(_sides(comparison))}</div>'),
        _differences(comparison),
        _table(comparison),
        _footer(comparison),
        "</main>",
    ]
    return document(f"{_title(comparison)}: attention compared", parts)


def _title(comparison: Comparison) -> str:
    a, b = (str(run.context.get("model", "model")) for run in (comparison.a, comparison.b))
    return f"Two runs of {a}" if a == b else f"{a} against {b}"


def _header(comparison: Comparison) -> str:
    table, settings = comparison.table, comparison.settings
    facts = [
        ("differences", f"{len(table):,}"),
        ("stand after correction", f"{int(table['significant'].sum()):,}"),
        ("heads", f"{len(table[['kind', 'layer', 'head']].drop_duplicates()):,}"),
        ("metrics", f"{table['metric'].nunique():,}"),
        ("resamples", f"{settings.resamples:,}"),
        ("intervals", f"{100 * settings.confidence:g} %"),
    ]
    cards = "".join(f'<div class="fact"><dt>{name}</dt><dd>{html.escape(value)}</dd></div>' for name, value in facts)
    leads = "".join(
        f'<p class="lead">{label}: <b>{html.escape(str(run.context.get("model", "model")))}</b> on '
        f"{html.escape(str(run.context.get('data', 'data')))}{html.escape(_length(run))}</p>"
        for label, run in (("A", comparison.a), ("B", comparison.b))
    )
    return (
        f'<header class="hero"><p class="kicker">comparison</p><h1>{html.escape(_title(comparison))}</h1>{leads}'
        f'<dl class="facts">{cards}</dl></header>'
    )


def _findings(comparison: Comparison) -> str:
    found = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in comparison.findings)
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in comparison.notes)
    return section(
        "findings",
        "Findings",
        f'<div class="grid"><div class="card finding"><h3>Differences</h3><ul>{found}</ul></div>'
        f'<div class="card notes"><h3>To keep in mind</h3><ul>{notes}</ul></div></div>',
    )


def _differences(comparison: Comparison) -> str:
    figures = comparison.figures()
    titles = []
    for name in figures:
        metric, _, kind = name.partition(", ")
        titles.append(describe(metric, comparison.metrics).title + (f", {kind}" if kind else ""))
    hint = (
        '<p class="hint">On the left B - A of every head; on the right B against A, where the dashed line is no '
        "difference. Intervals say what other sequences of the same sort might have given, not what another training "
        "would have.</p>"
    )
    return section("differences", "Differences", hint + chosen_html(titles, list(figures.values()), "figure", "Metric"))


def _table(comparison: Comparison) -> str:
    table = comparison.table
    half = ((table["high"] - table["low"]) / 2).to_numpy()
    # Metrics have different units: the interval's own width makes their differences comparable.
    size = np.divide(abs(table["difference"]), half, out=np.zeros(len(table)), where=half > 0)
    order = table.assign(size=size).sort_values(["significant", "size"], ascending=False, kind="stable")
    shown = order.drop(columns=["size", "paired", "p"])
    shown.insert(0, "name", [f"L{layer}H{head}" for layer, head in zip(shown["layer"], shown["head"], strict=True)])
    return section(
        "table",
        "Table",
        '<p class="hint">Those that stand first, then by difference over the width of its interval.</p>'
        f'<div class="card">{table_html(shown.drop(columns=["layer", "head"]), most=_MOST_ROWS)}</div>',
    )


def _footer(comparison: Comparison) -> str:
    about = {"settings": comparison.settings._asdict()} | {
        label: {"folder": str(run.path) if run.path else None, "config": run.config, "context": run.context}
        for label, run in (("A", comparison.a), ("B", comparison.b))
    }
    text = json.dumps(about, indent=2, default=str)
    return (
        f'<footer><details class="card"><summary>Configurations</summary><pre tabindex="0">{html.escape(text)}</pre>'
        '</details><p class="soft">Made by attnlab: bootstrap over sequences, percentile intervals, '
        "Benjamini-Hochberg.</p></footer>"
    )


def _sides(comparison: Comparison) -> pd.DataFrame:
    """What each run was of, side by side."""
    import pandas as pd

    sides = [_about(run) for run in (comparison.a, comparison.b)]
    return pd.DataFrame({"": list(sides[0]), "A": list(sides[0].values()), "B": list(sides[1].values())})


def _about(run: Run) -> dict[str, str]:
    data, context, config = run.config.get("data", {}), run.context, run.config
    return {
        "model": str(context.get("model", "")),
        "data": str(context.get("data", "")),
        "most tokens in a sequence": str(context.get("max_length") or "what the model allows"),
        "sequences": _count(data.get("sequences")),
        "tokens": _count(data.get("tokens")),
        "computed with": f"{config.get('dtype')} on {config.get('device')}, {config.get('backend')} backend",
        "analyses": ", ".join(str(study.get("name")) for study in config.get("analyses", [])),
        "attnlab": str(config.get("versions", {}).get("attnlab", "")),
        "folder": str(run.path) if run.path is not None else "in memory",
    }


def _length(run: Run) -> str:
    longest = run.context.get("max_length")
    return f", at most {longest:,} tokens" if isinstance(longest, int) else ""


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else ""

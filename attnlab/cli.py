"""The command `attnlab`: analyse a model, do experiments, compare two runs, list what is installed and shipped.

What the user can mend is one sentence on stderr and exit code 2; an interrupted run is exit code 130.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from attnlab import cli_compare, cli_experiment, cli_models, cli_options
from attnlab.errors import AttnlabError
from attnlab.terminal import print_rows, printable, quiet_libraries

if TYPE_CHECKING:
    from attnlab.runs.run import Run

_MOST_METRICS = 24
_DEFAULT_MODEL = "pydoc-4l"

app = typer.Typer(
    name="attnlab",
    help="Analyse what the attention heads of a transformer do, exactly, without the N x N matrix.",
    epilog="Start with: attnlab analyze        (the shipped model on the shipped texts)",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_models.app)
app.command(name="compare")(cli_compare.compare)
app.command(name="experiment")(cli_experiment.experiment)
app.command(name="experiments")(cli_experiment.experiments)


@app.callback(invoke_without_command=True)
def _attnlab(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        from importlib.metadata import version as installed_version

        typer.echo(f"attnlab {installed_version('attnlab')}")
        raise typer.Exit


@app.command()
def analyze(
    model: cli_options.Model = None,
    analysis: Annotated[
        list[str] | None,
        typer.Option("-a", "--analysis", help="Analysis to run; repeat for several.", show_default="all that fit"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "-d",
            "--data",
            help="Text file (split at the model's length), .json list of strings, .jsonl, .parquet, or the folder of a "
            "saved Hugging Face data set.",
            show_default="the shipped texts",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Folder of the run.", show_default="runs/<model>-<hash of the configuration>"),
    ] = None,
    column: cli_options.Column = None,
    max_length: cli_options.MaxLength = None,
    batch_size: cli_options.BatchSize = None,
    limit: cli_options.Limit = None,
    device: cli_options.Device = None,
    dtype: cli_options.Dtype = None,
    backend: Annotated[str, typer.Option(help="How attention is computed: auto, triton, tiled or dense.")] = "auto",
    seed: Annotated[int, typer.Option(help="For analyses that draw random numbers.")] = 0,
    keep_sequences: Annotated[
        bool,
        typer.Option(
            "--sequences/--no-sequences",
            help="Keep each metric of every single sequence, which `attnlab compare` needs: 4 bytes for each sequence, "
            "head and metric.",
        ),
    ] = True,
    resume: cli_options.Resume = True,
) -> None:
    """Analyse a model's attention on texts; write tables, arrays and a report.

    Examples:

    \b
      attnlab analyze
      attnlab analyze gpt2 -d prompts.jsonl -o runs/gpt2
      attnlab analyze ./checkpoint -a sinks -a entropy -d book.txt --max-length 1024 --limit 100
      attnlab analyze ./checkpoint -d ids.parquet --column input_ids --batch-size 4

    A run that was stopped goes on where it was when the same command is given again. The folder receives report.html
    (opens offline), tables/heads.parquet (one row for each head and metric), tables/ and arrays/ of each analysis,
    and run.json.
    """
    folder = None
    try:
        # Loading the libraries takes seconds, in which a user may think again.
        from attnlab.runs.job import prepare

        quiet_libraries()
        job = prepare(
            model if model is not None else default_model(),
            data,
            analyses=analysis or None,
            column=column,
            max_length=max_length,
            batch_size=batch_size,
            limit=limit,
            device=device,
            dtype=dtype,
            backend=backend,
            seed=seed,
            keep_sequences=keep_sequences,
        )
        folder = out if out is not None else _default_folder(job.model.name, job.config())
        run = job.run(folder, resume=resume, progress=True)
    except KeyboardInterrupt:
        kept = f"; what is computed is kept in {folder}, and the same command goes on from there" if folder else ""
        _say(f"Interrupted{kept}.")
        raise typer.Exit(130) from None
    _show(run)


@app.command()
def analyses() -> None:
    """List the analyses that are installed."""
    from attnlab.runs.registry import analysis_names, load_analysis

    rows = []
    for name in analysis_names():
        try:
            rows.append((name, load_analysis(name).summary))
        except AttnlabError as error:
            rows.append((name, f"(broken) {error}"))
    print_rows(rows)


def main() -> None:
    """The entry point: errors that the user can mend become one sentence and exit code 2."""
    # Read when torch loads: threads that wait by spinning are ten times slower beside one other busy process.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a token must not end the run.
        getattr(stream, "reconfigure", lambda **_: None)(errors="replace")
    warnings.showwarning = _show_warning
    try:
        app()
    except AttnlabError as error:
        _fail(str(error))


def _fail(sentence: str) -> NoReturn:
    _say(f"Error: {sentence}")
    sys.exit(2)


def _say(sentence: str) -> None:
    sys.stderr.write(printable(" ".join(sentence.split())) + "\n")


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    if not issubclass(category, DeprecationWarning | FutureWarning):
        _say(f"Note: {message}")


def default_model() -> str:
    """The shipped model that a command takes where none is named."""
    from attnlab.models import shipped_models

    if _DEFAULT_MODEL not in shipped_models():
        raise AttnlabError("No model comes with this installation of attnlab; name one: attnlab analyze MODEL.")
    return _DEFAULT_MODEL


def _default_folder(model_name: str, config: dict[str, object]) -> Path:
    """One folder for each configuration, so that the same command finds its own run again."""
    from attnlab.runs.config import config_hash

    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model_name).name).strip(".-") or "model"
    return Path("runs") / f"{name}-{config_hash(config)[:8]}"


def _show(run: Run) -> None:
    """Findings, the heads that stand out, and where the report is."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    console = Console(highlight=False, markup=False, emoji=False, width=None if terminal else 120)
    for name, result in run.results.items():
        console.print(Text(printable(name), style="bold"))
        for sentence in result.findings:
            console.print(Text(f"  {printable(sentence)}"), soft_wrap=not terminal)
    table = Table(box=None, pad_edge=False, title="Heads", title_style="bold", title_justify="left")
    for heading in ("metric", "kind", "mean", "highest heads", "lowest head"):
        table.add_column(heading, justify="right" if heading == "mean" else "left")
    groups = list(run.heads.groupby(["metric", "kind"], sort=False))
    for (metric, kind), rows in groups[:_MOST_METRICS]:
        ranked = rows.dropna(subset="value").sort_values("value", ascending=False, kind="stable")
        if ranked.empty:
            continue
        named = [f"L{r.layer}H{r.head} {r.value:.3g}" for r in ranked.itertuples()]
        cells = (str(metric), str(kind), f"{ranked['value'].mean():.3g}", "  ".join(named[:2]), named[-1])
        table.add_row(*(Text(printable(cell)) for cell in cells))
    if table.row_count:
        console.print()
        console.print(table)
    if len(groups) > _MOST_METRICS:
        console.print(f"and {len(groups) - _MOST_METRICS} more in the table of all heads")
    speed = run.performance.get("tokens_per_second")
    data = run.config["data"]
    console.print(
        f"\n{data['sequences']:,} sequences, {data['tokens']:,} tokens"
        + (f", {speed:,.0f} tokens/s, {run.performance['seconds']:.1f} s" if speed else "")
    )
    if run.path is not None:
        console.print(f"Tables: {printable(str(run.path / 'tables'))}", soft_wrap=True)
    if run.report_path is not None:
        console.print(f"Report: {printable(str(run.report_path))}", soft_wrap=True)

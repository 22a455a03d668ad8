"""`attnlab experiment` and `attnlab experiments`: studies of several passes, done and listed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from attnlab import cli_options
from attnlab.errors import AttnlabError
from attnlab.terminal import print_rows, printable, quiet_libraries


def experiment(
    name: Annotated[str, typer.Argument(metavar="NAME", help="One of `attnlab experiments`.")],
    model: cli_options.Model = None,
    data: Annotated[
        Path | None,
        typer.Option("-d", "--data", help="As for `attnlab analyze`.", show_default="the shipped texts"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Folder of the results.", show_default="runs/<name>-<model>-<hash>"),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="OPTION=VALUE", help="An option of the experiment; repeat for several."),
    ] = None,
    column: cli_options.Column = None,
    max_length: cli_options.MaxLength = None,
    limit: cli_options.Limit = None,
    batch_size: cli_options.BatchSize = None,
    device: cli_options.Device = None,
    dtype: cli_options.Dtype = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    resume: cli_options.Resume = True,
) -> None:
    """Do an experiment: a study that changes the model's attention, trains on it or makes its own sequences.

    Examples:

    \b
      attnlab experiment needle
      attnlab experiment needle ./checkpoint -o runs/needle --set "lengths=[512,1024]"

    A run that was stopped goes on where it was when the same command is given again. The folder receives report.html
    (opens offline), tables/ and arrays/, and experiment.json.
    """
    folder = None
    try:
        from attnlab.cli import default_model
        from attnlab.experiments.door import prepare

        quiet_libraries()
        prepared = prepare(
            model if model is not None else default_model(), name, data, column=column, max_length=max_length,
            limit=limit, batch_size=batch_size, device=device, dtype=dtype, seed=seed,
            options=read_options(option or []),
        )  # fmt: skip
        folder = out if out is not None else _default_folder(name, prepared.model.name, prepared.config())
        result = prepared.run(folder, resume=resume, progress=True)
    except KeyboardInterrupt:
        kept = f"; the steps that are done are kept in {folder}, and the same command goes on from there"
        sys.stderr.write(f"Interrupted{kept if folder else ''}.\n")
        raise typer.Exit(130) from None
    for sentence in result.findings:
        typer.echo(printable(sentence))
    typer.echo(f"\nTables: {printable(str(folder / 'tables'))}")
    typer.echo(f"Report: {printable(str(folder / 'report.html'))}")


def experiments() -> None:
    """List the experiments that are installed, with their options."""
    import dataclasses

    from attnlab.experiments.registry import experiment_names, load_experiment

    rows = []
    for name in experiment_names():
        try:
            kind = load_experiment(name)
        except AttnlabError as error:
            rows.append((name, f"(broken) {error}"))
            continue
        rows.append((name, kind.summary))
        options = [f"{field.name}={json.dumps(field.default, default=str)}" for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
        if options:
            rows.append(("", f"--set {', '.join(options)}"))
    print_rows(rows)


def read_options(given: list[str]) -> dict[str, object]:
    """Options from `name=value`, where the value is JSON, or else text.

    Raises:
        AttnlabError: one has no name or no value, or comes twice.

    Example:
        >>> read_options(["threshold=0.2", "lengths=[64, 128]", "rule=h2o"])
        {'threshold': 0.2, 'lengths': [64, 128], 'rule': 'h2o'}
    """
    found: dict[str, object] = {}
    for text in given:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name or not value.strip():
            raise AttnlabError(f"--set was given {text!r}; OPTION=VALUE was expected.")
        if name in found:
            raise AttnlabError(f"--set gives {name} twice.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value.strip()
    return found


def _default_folder(name: str, model_name: str, config: dict[str, object]) -> Path:
    from attnlab.runs.config import config_hash

    model = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model_name).name).strip(".-") or "model"
    return Path("runs") / f"{name}-{model}-{config_hash(config)[:8]}"

"""A finished run: its results, the table of all heads, and where they lie."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from attnlab.errors import AttnlabError, RunFolderError
from attnlab.results.metric import Metric
from attnlab.results.result import NamedArray, Result, combine_heads
from attnlab.runs.by_sequence import read_by_sequence
from attnlab.runs.store import RunFolder


@dataclass(frozen=True, eq=False)
class Run:
    """What `attnlab.analyze` gives back and `attnlab.load_run` reads.

    Attributes:
        results: the result of each analysis, by name.
        config: everything that the numbers depend on, as in `run.json`.
        context: what else is known of the run: names of model and data, notes, machine.
        performance: seconds, tokens per second, peak memory in bytes.
        path: the run's folder, None for a run in memory.
        kept: the values of each sequence of a run in memory; `sequences` has those of any run.
    """

    results: Mapping[str, Result]
    config: Mapping[str, Any]
    context: Mapping[str, Any]
    performance: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None
    kept: Mapping[str, NamedArray] = field(default_factory=dict)

    @cached_property
    def heads(self) -> pd.DataFrame:
        """One row for each head and metric: layer, head, kind, metric, value, stderr, n."""
        return combine_heads(self.results.values())

    @cached_property
    def metrics(self) -> Mapping[str, Metric]:
        """What the metrics of `heads` are called, in which unit and range, analysis after analysis, by name.

        Metrics that their analysis does not declare are missing, as are those of runs by versions before it could.
        """
        return {name: about for result in self.results.values() for name, about in result.metrics.items()}

    @cached_property
    def sequences(self) -> Mapping[str, NamedArray]:
        """The metrics of each single sequence by `kind.metric`, [sequence, layer, head], read when first asked for.

        Float32, NaN where a sequence has no value. What an analysis measured on sequences of its own is under
        `kind.metric@analysis`. Empty where the run was told to keep none.

        Raises:
            RunFolderError: the file is damaged.
        """
        return self.kept if self.path is None else read_by_sequence(self.path)

    @property
    def findings(self) -> tuple[str, ...]:
        """What was found, in plain sentences, analysis after analysis."""
        return tuple(sentence for result in self.results.values() for sentence in result.findings)

    @property
    def notes(self) -> tuple[str, ...]:
        """What there was to say about the data and the analyses: sequences cut, analyses left out."""
        return tuple(self.context.get("notes", ()))

    @property
    def report_path(self) -> Path | None:
        """The report, None where there is none."""
        if self.path is None or not (self.path / "report.html").exists():
            return None
        return self.path / "report.html"

    def __getitem__(self, analysis: str) -> Result:
        if analysis not in self.results:
            raise AttnlabError(f"This run has no analysis {analysis!r}; it has {', '.join(self.results)}.")
        return self.results[analysis]

    def __contains__(self, analysis: object) -> bool:
        return analysis in self.results

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __repr__(self) -> str:
        data = self.config["data"]
        where = f", {str(self.path)!r}" if self.path else ""
        return f"Run({self.context['model']!r}, {data['sequences']} sequences, {', '.join(self.results)}{where})"

    def _repr_html_(self) -> str:
        data = self.config["data"]
        found = "".join(
            f"<li><b>{html.escape(name)}</b>: {html.escape(result.findings[0])}</li>"
            for name, result in self.results.items()
            if result.findings
        )
        report = f"<p>Report: {html.escape(str(self.report_path))}</p>" if self.report_path else ""
        return (
            f"<p><b>{html.escape(str(self.context['model']))}</b> on {data['sequences']} sequences, "
            f"{data['tokens']:,} tokens</p><ul>{found}</ul>{report}"
        )


def load_run(path: str | Path) -> Run:
    """Reads a finished run's folder.

    Raises:
        RunFolderError: the folder does not exist, is not a run's, or its run was not finished.
    """
    path = Path(path)
    if not path.is_dir():
        raise RunFolderError(f"There is no folder {path}.")
    description = RunFolder(path).read_own_description()
    if description is None:
        raise RunFolderError(f"{path} holds no run.")
    if "performance" not in description:
        raise RunFolderError(f"The run in {path} was not finished; run the same again to go on.")
    config = _mapping(description["config"])
    names = [str(_mapping(study).get("name")) for study in _list(config.get("analyses"))]
    return Run(
        results={name: Result.load(path, name) for name in names},
        config=config,
        context=_mapping(description.get("context", {})),
        performance=_mapping(description["performance"]),
        path=path,
    )


def _mapping(value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise RunFolderError("run.json does not have the shape that attnlab writes.")
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise RunFolderError("run.json does not have the shape that attnlab writes.")
    return value

"""How metrics of `heads.parquet` appear in a figure: as their analysis declares them, or by their names in words."""

from __future__ import annotations

import html
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Protocol

import pandas as pd

from attnlab.results.metric import Metric

KINDS = {"self": "self-attention", "encoder": "encoder self-attention", "cross": "cross-attention"}
_NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)")


class Measured(Protocol):
    """A result or a run: tidy rows of heads, and how their metrics are shown."""

    @property
    def heads(self) -> pd.DataFrame:
        """Rows with the columns layer, head, kind, metric, value, stderr, n."""

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """Those that were declared, by name."""


def describe(metric: str, declared: Mapping[str, Metric] | None = None) -> Metric:
    """How to show a metric: as it was declared, or else by its name in words.

    >>> describe("previous_token").title
    'Previous token'
    >>> describe("h2o_kept_10", {"h2o_kept_10": Metric("Kept by H2O at 10 %")}).title
    'Kept by H2O at 10 %'
    """
    found = (declared or {}).get(metric)
    return found if found is not None else Metric(metric.replace("_", " ").capitalize())


def as_text(metric: Metric) -> Metric:
    """The same where Plotly, which reads HTML, is to show every character as it is.

    >>> as_text(Metric("Share of A < 1/N")).title
    'Share of A &lt; 1/N'
    """
    title, unit, meaning = (html.escape(text, quote=False) for text in (metric.title, metric.unit, metric.meaning))
    return Metric(title, unit, meaning, metric.low, metric.high)


def by_number(name: str) -> tuple[str | float, ...]:
    """A key to sort names by, in which numbers count as numbers.

    >>> sorted(["kept_10", "kept_5", "kept_2.5", "bound"], key=by_number)
    ['bound', 'kept_2.5', 'kept_5', 'kept_10']
    """
    return tuple(float(part) if place % 2 else part for place, part in enumerate(_NUMBER.split(name)))


def in_order(metrics: Iterable[str]) -> list[str]:
    """Metrics in the order in which to choose from them: those alone as they come, then each series by its numbers.

    A series are several names that differ in numbers only.

    >>> in_order(["kept_10", "kept_5", "entropy", "seen_5", "seen_2", "kept_50", "top_3"])
    ['entropy', 'top_3', 'kept_5', 'kept_10', 'kept_50', 'seen_2', 'seen_5']
    """
    alike: dict[str, list[str]] = defaultdict(list)
    for metric in dict.fromkeys(metrics):
        alike[_NUMBER.sub("#", metric)].append(metric)
    several = sorted(alike.values(), key=lambda names: len(names) > 1)
    return [metric for names in several for metric in sorted(names, key=by_number)]


def with_unit(value: str, unit: str) -> str:
    """A number with its unit.

    >>> with_unit("1.25", "nats"), with_unit("0.5", "")
    ('1.25 nats', '0.5')
    """
    return f"{value} {unit}" if unit else value

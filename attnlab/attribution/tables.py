"""From a number for each example to means with standard errors, and the tables of patching."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from attnlab.errors import AttnlabError


class Unit(NamedTuple):
    """What is patched at once: a head or a whole layer (`head` is None), at one position or all (None)."""

    layer: int
    head: int | None
    position: int | None

    def __str__(self) -> str:
        name = f"L{self.layer}" if self.head is None else f"L{self.layer}H{self.head}"
        return name if self.position is None else f"{name}@{self.position}"


class Span(NamedTuple):
    """The metric [examples] of the run that is patched, and of the run that the patches come from."""

    base: np.ndarray
    source: np.ndarray


def mean_and_stderr(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard error and number of the examples (first axis), NaN left out; the error of one example is NaN.

    Example:
        >>> [part.tolist() for part in mean_and_stderr(np.array([[1.0], [3.0], [np.nan]]))]
        [[2.0], [1.0], [2]]
    """
    n = (~np.isnan(values)).sum(0)
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(values, 0), np.nanstd(values, 0, ddof=1) / np.sqrt(n), n


def effects(change: np.ndarray, span: Span) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean change of the metric over the mean of its whole span, with the ratio's standard error (delta method).

    Args:
        change: [units, examples], patched less base; NaN where a unit is not in an example.
        span: of the same examples.

    Raises:
        AttnlabError: both runs have the same mean metric, so there is nothing to compare with.

    Example:
        >>> [part.tolist() for part in effects(np.array([[1.0, 1.0]]), Span(np.zeros(2), np.full(2, 4.0)))]
        [[0.25], [0.0], [2]]
    """
    whole = np.where(np.isnan(change), np.nan, span.source - span.base)
    if not abs(float((span.source - span.base).mean())) > 0:
        raise AttnlabError(
            f"The clean and the corrupted run have the same mean metric ({span.base.mean():.3g}), so no effect can be "
            "given as a share of their difference; choose prompts or a metric that differ."
        )
    of, to = mean_and_stderr(change.T)[0], mean_and_stderr(whole.T)[0]
    with np.errstate(invalid="ignore", divide="ignore"):
        effect = of / to
        _, stderr, n = mean_and_stderr(((change - effect[:, None] * whole) / to[:, None]).T)
    return effect, stderr, n


def patching_table(units: Sequence[Unit], change: np.ndarray, span: Span) -> pd.DataFrame:
    """One row a unit: layer, head, position, change (of the metric), effect (its share), stderr (of effect), n."""
    effect, stderr, n = effects(change, span)
    columns = {
        "layer": [unit.layer for unit in units], "head": [unit.head for unit in units],
        "position": [unit.position for unit in units], "change": mean_and_stderr(change.T)[0], "effect": effect,
        "stderr": stderr, "n": n,
    }  # fmt: skip
    return pd.DataFrame(columns).astype({"layer": "Int64", "head": "Int64", "position": "Int64"})


def whole_numbers(name: str, given: Sequence[int] | None, length: int) -> list[int] | None:
    """Positions counted from the start.

    Raises:
        ValueError: they are no whole numbers, or beyond the sequence.

    Example:
        >>> whole_numbers("positions", [0, -1], 5)
        [0, 4]
    """
    if given is None:
        return None
    numbers = [given] if isinstance(given, int) else list(given)
    if not numbers or any(isinstance(n, (bool, str)) or int(n) != n or not -length <= n < length for n in numbers):
        raise ValueError(f"{name} is {given!r}; expected whole numbers from {-length} to {length - 1}.")
    return [int(n) % length for n in numbers]

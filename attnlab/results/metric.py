"""What a metric of the heads is called, in which unit it is, and over which range its colours run."""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """How a metric of the heads is shown; whoever makes a `Result` declares it there, under the metric's name.

    Attributes:
        title: for headings.
        unit: of the value, empty for a plain share.
        meaning: one line under the heading.
        low, high: ends of the colour scale, which data beyond them extend; None takes the data's.

    >>> Metric("Attention entropy", "nats", "mean over query rows of -Σ A ln A", low=0.0).unit
    'nats'
    """

    title: str
    unit: str = ""
    meaning: str = ""
    low: float | None = None
    high: float | None = None

"""Which score makes which role, and from which value on.

Previous-token, duplicate-token and induction heads by the mean of their entries (Olsson et al., arXiv 2209.11895),
sinks by the weight on the first token (Gu et al., arXiv 2410.10781), positional heads by where their largest weight
lies (Voita et al., arXiv 1905.09418). The threshold is applied to each sequence; a head has the role when most of its
sequences pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from attnlab.errors import AttnlabError
from attnlab.results import Metric


class Role(NamedTuple):
    """A role.

    Attributes:
        name: in tables.
        words: in sentences, before "head".
        score: the metric that is compared.
        threshold: a sequence passes above it.
        inclusive: whether it passes at the threshold too.
    """

    name: str
    words: str
    score: str
    threshold: float
    inclusive: bool = False

    def passes(self, scores: Tensor, threshold: float) -> Tensor:
        """Which sequences pass, boolean; NaN does not."""
        return scores >= threshold if self.inclusive else scores > threshold


ROLES = (
    Role("previous_token", "previous-token", "previous_token", 0.5),
    Role("current_token", "current-token", "current_token", 0.5),
    Role("duplicate_token", "duplicate-token", "duplicate_token", 0.5),
    Role("induction", "induction", "induction", 0.5),
    Role("sink", "sink", "first_token", 0.3),
    Role("local", "local", "local", 0.8),
    Role("delimiter", "delimiter", "delimiter", 0.5),
    Role("positional", "positional", "positional", 0.9, inclusive=True),
)
METRICS = {
    "previous_token": Metric("Previous token", "", "mean over query rows of the weight on the token before", 0.0, 1.0),
    "current_token": Metric("Current token", "", "mean over query rows of the weight on the token itself", 0.0, 1.0),
    "duplicate_token": Metric(
        "Duplicate token", "", "random tokens repeated: weight on the token's earlier place", 0.0, 1.0
    ),
    "induction": Metric("Induction", "", "random tokens repeated: weight on what followed the earlier place", 0.0, 1.0),
    "first_token": Metric("First token", "", "mean over the first 64 query rows after the first one", 0.0, 1.0),
    "local": Metric(
        "Local", "", "mean weight on the window around the token, where there are keys outside it", 0.0, 1.0
    ),
    "delimiter": Metric(
        "Delimiters", "", "mean weight on punctuation, line breaks, marks of beginning and end", 0.0, 1.0
    ),
    "positional": Metric("Positional", "", "share of query rows whose largest weight is on the neighbour", 0.0, 1.0),
    "confidence": Metric("Confidence", "", "mean over query rows of the largest weight, end tokens left out", 0.0, 1.0),
    "detector_previous_token": Metric(
        "Previous token, by detector", "", "share of all weight that lies on the token before", 0.0, 1.0
    ),
    "detector_duplicate_token": Metric(
        "Duplicate token, by detector", "", "share of all weight that lies on earlier copies of the token", 0.0, 1.0
    ),
    "detector_induction": Metric(
        "Induction, by detector", "", "share of all weight that lies on what followed earlier copies", 0.0, 1.0
    ),
}


def resolved_thresholds(given: Mapping[str, float] | None) -> dict[str, float]:
    """The threshold of every role: those given, and the defaults.

    Raises:
        AttnlabError: there is no such role, or a threshold is no number from 0 to 1.

    >>> resolved_thresholds({"sink": 0.2})["sink"], resolved_thresholds(None)["sink"]
    (0.2, 0.3)
    """
    if given is not None and not isinstance(given, Mapping):
        raise AttnlabError(f"Thresholds are a mapping of roles to numbers; got {given!r}.")
    found = {role.name: role.threshold for role in ROLES}
    for name, value in (given or {}).items():
        if name not in found:
            raise AttnlabError(f"There is no role {name!r} to give a threshold; there are: {', '.join(found)}.")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise AttnlabError(f"The threshold of {name!r} is a share of attention, 0 to 1; got {value!r}.")
        found[name] = float(value)
    return found

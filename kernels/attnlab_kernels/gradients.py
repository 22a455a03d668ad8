"""What flows back into an `attention` call: the gradients of those of its results that carry any."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

DIFFERENTIABLE = ("lse", "entropy", "key_probes")
"""Statistics that carry gradients, beside the output."""


class ResultGradients(NamedTuple):
    """Gradients of the output [B, Hq, Nq, Dv], lse and entropy [B, Hq, Nq], key probes' product [B, Hq, Nq, G]."""

    out: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    key_probes: Tensor | None = None

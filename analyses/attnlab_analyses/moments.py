"""Running means and spreads for each head, over sequences or over rows, that merge exactly in any grouping.

Count, mean and M2 = sum of squared deviations, merged by the rule of Chan, Golub and LeVeque ("Algorithms for computing
the sample variance", 1983), which does not lose digits when the spread is small beside the mean.

Shapes: L layers, H heads of the widest layer, B sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class HeadMoments:
    """Count, mean and M2 of a quantity for each (layer, head), float64 on the CPU.

    >>> moments = HeadMoments((2,))
    >>> moments.add(0, torch.tensor([[1.0, 5.0], [3.0, float("nan")]]))
    >>> moments.mean[0].tolist(), moments.count[0].tolist(), moments.stderr()[0].tolist()
    ([2.0, 5.0], [2.0, 1.0], [1.0, nan])
    """

    def __init__(self, heads: Sequence[int]) -> None:
        shape = (len(heads), max(heads, default=0))
        self.count = torch.zeros(shape, dtype=torch.float64)
        self.mean = torch.zeros(shape, dtype=torch.float64)
        self.m2 = torch.zeros(shape, dtype=torch.float64)

    def add(self, layer: int, values: Tensor) -> None:
        """Takes in samples [B, heads of the layer]; a NaN is a sample that does not exist."""
        values = values.detach().to("cpu", torch.float64)
        there = ~values.isnan()
        count = there.sum(0).double()
        mean = torch.where(there, values, 0.0).sum(0) / count.clamp(min=1)
        m2 = torch.where(there, values - mean, 0.0).square().sum(0)
        self.add_moments(layer, count, mean, m2)

    def add_moments(self, layer: int, count: Tensor, mean: Tensor, m2: Tensor) -> None:
        """Takes in samples by their own moments, each [heads of the layer]."""
        n = count.numel()
        merged = _merged(
            (self.count[layer, :n], self.mean[layer, :n], self.m2[layer, :n]),
            (count.cpu().double(), mean.cpu().double(), m2.cpu().double()),
        )
        self.count[layer, :n], self.mean[layer, :n], self.m2[layer, :n] = merged

    def merge(self, other: HeadMoments) -> None:
        """Adds the samples that `other` holds."""
        self.count, self.mean, self.m2 = _merged((self.count, self.mean, self.m2), (other.count, other.mean, other.m2))

    def sd(self) -> Tensor:
        """Standard deviation of the samples, with n - 1; NaN for fewer than two. [L, H]"""
        return torch.where(self.count > 1, (self.m2 / (self.count - 1).clamp(min=1)).sqrt(), torch.nan)

    def stderr(self) -> Tensor:
        """Standard error of the mean; NaN for fewer than two samples. [L, H]"""
        return self.sd() / self.count.sqrt()

    def state_dict(self, prefix: str) -> dict[str, Tensor]:
        """The state, every name beginning with `prefix`."""
        return {f"{prefix}.count": self.count, f"{prefix}.mean": self.mean, f"{prefix}.m2": self.m2}

    def load_state_dict(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """Takes the state that `state_dict(prefix)` gave."""
        self.count, self.mean, self.m2 = (state[f"{prefix}.{part}"].clone() for part in ("count", "mean", "m2"))


_Moments = tuple[Tensor, Tensor, Tensor]


def _merged(a: _Moments, b: _Moments) -> _Moments:
    (count_a, mean_a, m2_a), (count_b, mean_b, m2_b) = a, b
    count = count_a + count_b
    share = count_b / count.clamp(min=1)
    delta = mean_b - mean_a
    return count, mean_a + delta * share, m2_a + m2_b + delta.square() * count_a * share

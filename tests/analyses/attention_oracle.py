"""The statistics of whole attention matrices in float64, written as the definitions read, without our own code."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Expected(NamedTuple):
    """One sequence's value of each metric for each head of a layer."""

    entropy: np.ndarray
    entropy_normalized: np.ndarray
    effective_keys: np.ndarray
    max_probability: np.ndarray
    distance: np.ndarray
    sink_mass: np.ndarray


def expected_of(pattern: Tensor, rows: Tensor, visible: Tensor) -> Expected:
    """From one sequence's pattern [H, Nq, Nk], which rows count [Nq], and which entries are visible [Nq, Nk]."""
    heads, n_queries, _ = pattern.shape
    found: dict[str, list[list[float]]] = {name: [[] for _ in range(heads)] for name in Expected._fields}
    seen = [j for j in range(pattern.shape[2]) if any(rows[i] and visible[i, j] for i in range(n_queries))]
    for h in range(heads):
        for i in range(n_queries):
            if not rows[i] or not visible[i].any():
                continue
            p = pattern[h, i].double()
            entropy = torch.distributions.Categorical(probs=p).entropy().item()
            found["entropy"][h].append(entropy)
            if visible[i].sum() > 1:
                found["entropy_normalized"][h].append(entropy / math.log(int(visible[i].sum())))
            found["effective_keys"][h].append(1 / float((p * p).sum()))
            found["max_probability"][h].append(float(p.max()))
            found["distance"][h].append(sum(float(p[j]) * (i - j) for j in range(len(p))))
            found["sink_mass"][h].append(float(p[seen[0]]))
    return Expected(*(np.array([np.mean(v) if v else np.nan for v in found[name]]) for name in Expected._fields))

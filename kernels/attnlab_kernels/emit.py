"""What to compute beside the attention output (`Emit`), and what was computed (`Emitted`).

Shape letters: B batch, Hq query heads, Nq queries, Nk keys, G probe columns, T gathered keys, R chosen rows or columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Emit:
    """The statistics asked for; everything is off by default."""

    lse: bool = False
    entropy: bool = False
    max_probability: bool = False
    argmax: bool = False
    collision: bool = False
    visible: bool = False
    key_probes: Tensor | None = None
    query_probes: Tensor | None = None
    gather: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    key_sum: bool = False
    key_square: bool = False
    key_max: bool = False
    pool: int | tuple[int, ...] | None = None
    offsets: Sequence[int] | Tensor | tuple[Sequence[int] | Tensor, ...] | None = None
    top_k: int | None = None
    head_gram: bool = False


@dataclass(frozen=True, eq=False)
class Emitted:
    """The statistics computed, float32 (float64 from a float64 dense computation), None where not asked."""

    lse: Tensor | None = None
    entropy: Tensor | None = None
    max_probability: Tensor | None = None
    argmax: Tensor | None = None
    collision: Tensor | None = None
    visible: Tensor | None = None
    learned_sink_mass: Tensor | None = None
    key_probes: Tensor | None = None
    query_probes: Tensor | None = None
    gathered: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    key_sum: Tensor | None = None
    key_square: Tensor | None = None
    key_max: Tensor | None = None
    key_count: Tensor | None = None
    pooled: Tensor | tuple[Tensor, ...] | None = None
    pooled_count: Tensor | tuple[Tensor, ...] | None = None
    offsets: Tensor | tuple[Tensor, ...] | None = None
    offset_count: Tensor | tuple[Tensor, ...] | None = None
    top_k_values: Tensor | None = None
    top_k_keys: Tensor | None = None
    head_gram: Tensor | None = None

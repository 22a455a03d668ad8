"""What to compute beside the attention output (`Emit`), and what was computed (`Emitted`).

Shape letters: B batch, Hq query heads, Nq queries, Nk keys, G probe columns, T gathered keys, R chosen rows or columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Emit:
    """The statistics asked for; everything is off by default.

    "Over queries" leaves out the rows that `query_mask` does. Indices of -1 stand for none and read 0.

    Attributes:
        lse, entropy, max_probability, argmax, collision: of each row; see `Emitted`.
        visible: how many keys each row sees.
        key_probes: [Nk, G], [B, Nk, G] or [B, Hq, Nk, G], F of A F.
        query_probes: [Nq, G], [B, Nq, G] or [B, Hq, Nq, G], W of A^T W.
        gather: [B, Nq, T], keys whose entries each row wants.
        rows, columns: [R] or [B, R], queries whose rows and keys whose columns are wanted.
        key_sum, key_square, key_max: of each key over queries, always with `key_count`.
        pool: block size of a pooled map; a sequence for several maps.
        offsets: increasing integer edges of distances i + query_offset - j; a tuple of such for several profiles.
        top_k: number of largest entries of each row.
        head_gram: <A_h, A_g> for all pairs of heads.
    """

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
    pool: int | Sequence[int] | None = None
    offsets: Sequence[int] | Tensor | tuple[Sequence[int] | Tensor, ...] | None = None
    top_k: int | None = None
    head_gram: bool = False


@dataclass(frozen=True, eq=False)
class Emitted:
    """The statistics computed, None where not asked; float32, or float64 from float64 inputs, and int64 indices.

    A is the pattern and P = A / (row sum, with a learned sink); under softmax without a sink they are the same.

    Attributes:
        lse: [B, Hq, Nq], ln of the row's sum of e^S, with a learned sink; under sigmoid ln of the row's sum of A.
        entropy: [B, Hq, Nq], nats, of P with a learned sink's share.
        max_probability: [B, Hq, Nq], the largest P of a key.
        argmax: [B, Hq, Nq], that key; -1 in a row that sees none.
        collision: [B, Hq, Nq], sum over keys of P^2.
        visible: [B, Hq, Nq], number of keys that the row sees.
        learned_sink_mass: [B, Hq, Nq], the sink's share; whenever there are learned sinks.
        key_probes: [B, Hq, Nq, G], A F.
        query_probes: [B, Hq, Nk, G], A^T W over queries that count.
        gathered: [B, Hq, Nq, T]. rows: [B, Hq, R, Nk]. columns: [B, Hq, Nq, R]. Entries of A.
        key_sum, key_square, key_max: [B, Hq, Nk], sum of A, sum of A^2 and largest A over queries that count.
        key_count: [B, Hq, Nk], number of queries that count and see the key.
        pooled: [B, Hq, ceil(Nq / b), ceil(Nk / b)], mean of A over a block's entries that are visible to queries that
            count, 0 without any; a tuple of maps when several were asked for. pooled_count: their number.
        offsets: [B, Hq, bins], sum of A over such entries at distances of each bin; a tuple when several were asked
            for. offset_count: their number.
        top_k_values, top_k_keys: [B, Hq, Nq, k], the largest P in falling order and their keys; 0 and -1 where the row
            sees fewer than k keys.
        head_gram: [B, Hq, Hq], sum of A_h * A_g over queries that count.
    """

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

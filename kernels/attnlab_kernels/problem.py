"""One attention problem with every option resolved: which entries are visible, and their logits.

All torch backends read masks, biases and logits from here, so each option is written once. A problem can be cut: a
block of batch rows, key heads, queries and keys is again a problem, whose positions are shifted.

Shape letters: b batch, h query heads, n key heads, g query heads of one key head, i queries, j keys, d columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Normalizer = Literal["softmax", "sigmoid"]


class RelativeBias(NamedTuple):
    """T5's relative position bias (arXiv 1910.10683): a learned number for each bucket of distances and head.

    Attributes:
        table: [buckets, Hq]. The bias of query i on key j is `table[bucket(j - i - query_offset), head]`.
        bidirectional: half of the buckets for keys after the query (encoders); without it these share bucket 0.
        max_distance: distances from here on share the last bucket.

    Example:
        >>> RelativeBias(torch.zeros(32, 8)).max_distance
        128
    """

    table: Tensor
    bidirectional: bool = True
    max_distance: int = 128


def relative_buckets(relative: Tensor, buckets: int, bidirectional: bool, max_distance: int) -> Tensor:
    """Bucket of each relative position j - i, as T5 numbers them: exact near, logarithmic far.

    Example:
        >>> relative_buckets(torch.tensor([0, -1, -9, -500]), 32, False, 128).tolist()
        [0, 1, 9, 31]
    """
    first = torch.zeros_like(relative)
    if bidirectional:
        buckets //= 2
        first = (relative > 0).long() * buckets
        distance = relative.abs()
    else:
        distance = (-relative).clamp(min=0)
    exact = buckets // 2
    far = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    far = (exact + far.long()).clamp(max=buckets - 1)
    return first + torch.where(distance < exact, distance, far)


@dataclass(frozen=True, eq=False)
class Problem:
    """What `attention` was asked to compute, checked and with its defaults filled in.

    Query i stands at position i + offset among the keys. `first_tokens` and `prefix` may be negative in a cut.

    Attributes:
        q, k, v: [b, h, i, d], [b, n, j, d], [b, n, j, dv].
        key_probes: [b or 1, h or 1, j, G], more value columns that are read and not written to the output.
        mask, bias: [b or 1, h or 1, i or 1, j or 1].
        query_segments, key_segments: [b, i], [b, j].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    causal: bool
    offset: int
    window: int | None = None
    first_tokens: int = 0
    prefix: Tensor | None = None
    query_segments: Tensor | None = None
    key_segments: Tensor | None = None
    key_mask: Tensor | None = None
    query_mask: Tensor | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    alibi: Tensor | None = None
    relative_bias: RelativeBias | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    normalizer: Normalizer = "softmax"
    sigmoid_bias: Tensor | None = None
    key_probes: Tensor | None = None

    @property
    def batch(self) -> int:
        """Number of batch rows."""
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.q.shape[1]

    @property
    def key_heads(self) -> int:
        """Number of key heads."""
        return self.k.shape[1]

    @property
    def group(self) -> int:
        """Number of query heads that share a key head."""
        return self.q.shape[1] // self.k.shape[1] if self.k.shape[1] else 1

    @property
    def queries(self) -> int:
        """Number of queries."""
        return self.q.shape[2]

    @property
    def keys(self) -> int:
        """Number of keys."""
        return self.k.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """What to compute in: float64 for float64 inputs, else float32."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    def cut(self, b: slice, n: slice, i: slice, j: slice) -> Problem:
        """The same problem on a block of batch rows, key heads (with all their queries' heads), queries and keys."""
        h = slice(n.start * self.group, n.stop * self.group)
        relative = self.relative_bias
        return replace(
            self,
            q=self.q[b, h, i],
            k=self.k[b, n, j],
            v=self.v[b, n, j],
            offset=self.offset + i.start - j.start,
            first_tokens=self.first_tokens - j.start,
            prefix=None if self.prefix is None else self.prefix[b] - j.start,
            query_segments=None if self.query_segments is None else self.query_segments[b, i],
            key_segments=None if self.key_segments is None else self.key_segments[b, j],
            key_mask=None if self.key_mask is None else self.key_mask[b, j],
            query_mask=None if self.query_mask is None else self.query_mask[b, i],
            mask=cut_broadcast(self.mask, (b, h, i, j)),
            bias=cut_broadcast(self.bias, (b, h, i, j)),
            alibi=None if self.alibi is None else self.alibi[h],
            relative_bias=None if relative is None else relative._replace(table=relative.table[:, h]),
            sinks=None if self.sinks is None else self.sinks[h],
            sigmoid_bias=None if self.sigmoid_bias is None else self.sigmoid_bias[h],
            key_probes=None if self.key_probes is None else cut_broadcast(self.key_probes[:, :, j], (b, h)),
        )

    def learned(self) -> dict[str, Tensor]:
        """The tensors that gradients reach, by field name."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name in _LEARNED}
        if self.relative_bias is not None:
            found["relative_bias"] = self.relative_bias.table
        return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}

    def with_learned(self, tensors: dict[str, Tensor]) -> Problem:
        """The same problem reading these tensors in place of its own, named as `learned` names them."""
        changed: dict[str, object] = dict(tensors)
        if self.relative_bias is not None and "relative_bias" in tensors:
            changed["relative_bias"] = self.relative_bias._replace(table=tensors["relative_bias"])
        return replace(self, **changed)  # type: ignore[arg-type]

    def distances(self) -> Tensor:
        """[i, j], i + offset - j."""
        rows = torch.arange(self.queries, device=self.q.device) + self.offset
        return rows[:, None] - torch.arange(self.keys, device=self.q.device)

    def positions_all_visible(self) -> bool:
        """Whether causality and window hide nothing here."""
        nearest, farthest = self.offset - (self.keys - 1), self.queries - 1 + self.offset
        inside = self.window is None or max(abs(nearest), abs(farthest)) < self.window
        return inside and (not self.causal or nearest >= 0)

    def visible(self) -> Tensor | None:
        """[b or 1, h or 1, i, j], True where the query sees the key; None where every query sees every key."""
        seen: Tensor | None = None
        if not self.positions_all_visible():
            distance = self.distances()[None, None]
            seen = torch.ones_like(distance, dtype=torch.bool)
            if self.window is not None:
                seen = distance.abs() < self.window
                if self.first_tokens > 0:
                    seen[..., : self.first_tokens] = True
            if self.causal:
                seen = seen & (distance >= 0)
            if self.prefix is not None:
                before = torch.arange(self.keys, device=self.q.device) < self.prefix[:, None]
                seen = seen | before[:, None, None, :]
        if self.query_segments is not None and self.key_segments is not None:
            seen = _both(seen, (self.query_segments[:, :, None] == self.key_segments[:, None, :])[:, None])
        if self.key_mask is not None:
            seen = _both(seen, self.key_mask[:, None, None, :])
        if self.mask is not None:
            seen = _both(seen, self.mask)
        if self.bias is not None:
            seen = _both(seen, self.bias != -math.inf)
        return seen

    def visible_float(self) -> Tensor:
        """[b or 1, h or 1, i, j], 1 where a query that counts sees the key, else 0."""
        seen = self.visible()
        if seen is None:
            seen = torch.ones(1, 1, self.queries, self.keys, dtype=torch.bool, device=self.q.device)
        if self.query_mask is not None:
            seen = seen & self.query_mask[:, None, :, None]
        return seen.expand(-1, -1, self.queries, self.keys).to(self.dtype)

    def position_bias(self) -> Tensor | None:
        """[b or 1, h or 1, i or 1, j or 1], the sum of all biases; None without any."""
        total: Tensor | None = None if self.bias is None else self.bias.to(self.dtype)
        if self.alibi is not None:
            slope = self.alibi.to(self.dtype)[:, None, None]
            term = (-slope * self.distances().abs().to(self.dtype))[None]
            total = term if total is None else total + term
        if self.relative_bias is not None:
            table, bidirectional, max_distance = self.relative_bias
            start = -(self.queries - 1) - self.offset
            # Without queries, as many as one would have.
            diagonals = torch.arange(start, start + max(1, self.queries) + self.keys - 1, device=self.q.device)
            buckets = relative_buckets(diagonals, table.shape[0], bidirectional, max_distance)
            by_diagonal = table.to(self.dtype)[buckets].T
            term = by_diagonal.unfold(-1, self.keys, 1).flip(-2)[None, :, : self.queries]
            total = term if total is None else total + term
        return total

    def scores(self) -> Tensor:
        """[b, h, i, j], scale * q . k."""
        b, n, g, i = self.batch, self.key_heads, self.group, self.queries
        q = (self.q.to(self.dtype) * self.scale).reshape(b, n, g * i, self.q.shape[-1])
        return (q @ self.k.to(self.dtype).transpose(-1, -2)).view(b, n * g, i, self.keys)

    def logits(self) -> Tensor:
        """[b, h, i, j], what the softmax is taken of where the entry is visible; hidden entries are not yet hidden.

        With the sigmoid normaliser this is ln sigmoid(s + b): its exponential is the weight itself, and a softmax of it
        the weights divided by their sum, so row statistics need no case of their own.
        """
        s = self.scores()
        if self.softcap is not None:
            s = self.softcap * torch.tanh(s / self.softcap)
        bias = self.position_bias()
        if bias is not None:
            s = s + bias
        if self.normalizer == "sigmoid":
            if self.sigmoid_bias is not None:
                s = s + self.sigmoid_bias.to(self.dtype)[:, None, None]
            s = torch.nn.functional.logsigmoid(s)
        return s


_LEARNED = ("q", "k", "v", "bias", "alibi", "sinks", "sigmoid_bias", "key_probes")


def cut_broadcast(tensor: Tensor | None, index: tuple[slice, ...]) -> Tensor | None:
    """Slice a tensor's first dimensions, those of size 1 apart, which broadcast."""
    if tensor is None:
        return None
    return tensor[tuple(at if size > 1 else slice(None) for at, size in zip(index, tensor.shape, strict=False))]


def _both(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else first & second

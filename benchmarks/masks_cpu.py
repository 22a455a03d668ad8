"""The masks and variants that `attention_cpu.py` times, each with what its peers are given.

Torch's kernel gets the same visible entries: causality as its flag, anything else as a mask that exists beforehand,
with biases in it. What it does not have (softcap, learned sinks, sigmoid) it leaves out, and does less than we do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from attnlab_kernels import Emitted, RelativeBias
from attnlab_kernels.resolve import resolve_problem
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Options = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """What one row of the table is measured on; a variant may deviate from it."""

    length: int
    heads: int
    head_dim: int


@dataclass(frozen=True)
class Variant:
    """One mask or option of `attention`.

    Attributes:
        options: of `attention`, made for a size.
        batch, key_heads_part, queries_part: batch rows (which share the heads), query heads of a key head, and into how
            many parts the sequence is cut of which the last one asks.
        left_out: what torch's kernel does not have.
    """

    name: str
    options: Callable[[Size], Options] = field(default=lambda size: {})
    batch: int = 1
    group: int = 1
    queries_part: int = 1
    left_out: str = ""

    def inputs(self, size: Size) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k, v."""
        generator = torch.Generator().manual_seed(0)
        heads = max(1, size.heads // self.batch)
        q, k, v = (
            torch.randn(self.batch, h, n, size.head_dim, generator=generator)
            for h, n in (
                (heads, size.length // self.queries_part),
                (max(1, heads // self.group), size.length),
                (max(1, heads // self.group), size.length),
            )
        )
        return q, k, v


class Peers:
    """Torch's own kernel and materialising on the inputs of a variant; their masks exist before they are timed."""

    def __init__(self, qkv: tuple[Tensor, Tensor, Tensor], options: Options) -> None:
        problem = resolve_problem(*qkv, **options)
        seen, bias = problem.visible(), problem.position_bias()
        self.qkv, self.options, self.problem = qkv, options, problem
        self.is_causal = set(options) <= {"causal", "softcap", "sinks", "normalizer", "sigmoid_bias", "query_mask"}
        self.is_causal = self.is_causal and problem.causal and problem.queries == problem.keys
        self.mask = None if self.is_causal or (seen is None and bias is None) else seen
        if bias is not None:
            self.mask = bias if seen is None else bias.masked_fill(~seen, -math.inf)
            self.mask = self.mask.contiguous()
        self.additive = self._additive(seen, bias)

    @property
    def given(self) -> str:
        """How torch's kernel is told what is visible."""
        if self.mask is None:
            return "is_causal" if self.is_causal else "no mask"
        return "boolean mask" if self.mask.dtype == torch.bool else "float mask"

    def _additive(self, seen: Tensor | None, bias: Tensor | None) -> Tensor | None:
        if self.mask is not None and self.mask.is_floating_point():
            return self.mask
        return None if seen is None else torch.zeros(seen.shape).masked_fill_(~seen, -math.inf)

    def scaled_dot_product(self) -> tuple[Tensor, Emitted]:
        """Torch's fused kernel."""
        out = scaled_dot_product_attention(
            *self.qkv, attn_mask=self.mask, is_causal=self.is_causal, enable_gqa=self.problem.group > 1
        )
        return out, Emitted()

    def materialised(self) -> tuple[Tensor, Emitted]:
        """The usual way, each step over the whole matrix."""
        q, k, v = self.qkv
        p = self.problem
        k, v = (t.repeat_interleave(p.group, 1) if p.group > 1 else t for t in (k, v))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if p.softcap is not None:
            scores = p.softcap * torch.tanh(scores / p.softcap)
        if self.additive is not None:
            scores = scores + self.additive
        if p.normalizer == "sigmoid":
            a = torch.sigmoid(scores if p.sigmoid_bias is None else scores + p.sigmoid_bias.float()[:, None, None])
            total = a.sum(-1, keepdim=True)
            shares = a / total
            lse = torch.log(total).squeeze(-1)
        else:
            if p.sinks is not None:
                scores = torch.cat([scores, p.sinks[:, None, None].expand(*q.shape[:3], 1)], -1)
            lse = torch.logsumexp(scores, -1)
            shares = torch.softmax(scores, -1)
            a = shares[..., : k.shape[-2]]
        entropy = -(shares * torch.log(shares + 1e-12)).sum(-1)
        largest = shares[..., : k.shape[-2]].amax(-1)
        read = a if p.query_mask is None else a * p.query_mask[:, None, :, None]
        return a @ v, Emitted(lse=lse, entropy=entropy, max_probability=largest, key_sum=read.sum(-2))


def documents(length: int) -> Tensor:
    """[1, length] ids of eight documents of different lengths, as packing gives."""
    parts = torch.tensor([3, 1, 5, 2, 8, 4, 6, 3])
    stops = (parts.cumsum(0) * length) // int(parts.sum())
    return torch.searchsorted(stops, torch.arange(length), right=True)[None]


def padding(length: int) -> Tensor:
    """[2, length], one whole row and one of which a third is padding on the right."""
    return torch.arange(length) < torch.tensor([[length], [length - length // 3]])


def picture_mask(length: int) -> Tensor:
    """[1, 1, length, length], causal but for a block in the middle whose tokens all see each other."""
    at = torch.arange(length)
    inside = (at >= length // 4) & (at < length // 2)
    return ((at[:, None] >= at) | (inside[:, None] & inside))[None, None]


def random_numbers(*shape: int) -> Tensor:
    """Standard normal, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def slopes(heads: int) -> Tensor:
    """ALiBi's."""
    return 2 ** (-8 * torch.arange(1, heads + 1) / heads)


VARIANTS = (
    Variant("full"),
    Variant("causal", lambda s: {"causal": True}),
    Variant("causal with cache (queries a quarter of keys)", lambda s: {"causal": True}, queries_part=4),
    Variant("sliding window (an eighth)", lambda s: {"causal": True, "window": s.length // 8}),
    Variant("two-sided window (an eighth each side)", lambda s: {"window": s.length // 8}),
    Variant(
        "window (an eighth) and first 4 tokens",
        lambda s: {"causal": True, "window": s.length // 8, "first_tokens": 4},
    ),
    Variant("prefix (a quarter)", lambda s: {"causal": True, "prefix": torch.tensor([s.length // 4])}),
    Variant("packed documents, causal", lambda s: {"causal": True, "segments": documents(s.length)}),
    Variant("packed documents, both sides", lambda s: {"segments": documents(s.length)}),
    Variant(
        "padding, causal",
        lambda s: {"causal": True, "key_mask": padding(s.length), "query_mask": padding(s.length)},
        batch=2,
    ),
    Variant("boolean mask (causal, one block both ways)", lambda s: {"mask": picture_mask(s.length)}),
    Variant(
        "boolean mask (half of the entries at random)", lambda s: {"mask": random_numbers(1, 1, s.length, s.length) > 0}
    ),
    Variant("additive bias", lambda s: {"bias": random_numbers(1, s.heads, s.length, s.length)}),
    Variant("ALiBi, causal", lambda s: {"causal": True, "alibi": slopes(s.heads)}),
    Variant("T5's relative bias", lambda s: {"relative_bias": RelativeBias(random_numbers(32, s.heads))}),
    Variant("softcap, causal", lambda s: {"causal": True, "softcap": 30.0}, left_out="softcap"),
    Variant(
        "learned sinks, causal", lambda s: {"causal": True, "sinks": random_numbers(s.heads)}, left_out="learned sinks"
    ),
    Variant(
        "sigmoid, causal",
        lambda s: {"causal": True, "normalizer": "sigmoid", "sigmoid_bias": -math.log(s.length)},
        left_out="sigmoid",
    ),
    Variant("grouped heads (4 a key head), causal", lambda s: {"causal": True}, group=4),
)

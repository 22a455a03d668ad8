"""What `attention_gpu.py` times: shapes, masks, statistics, and torch's own kernels on the same visible entries."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from attnlab_kernels import Emit
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Options = dict[str, Any]
MASK_LENGTH = 16384
"""Longest sequence for which a peer is given a boolean matrix."""


@dataclass(frozen=True)
class Shape:
    """Heads of queries and keys, and columns of a head."""

    name: str
    heads: int
    key_heads: int
    head_dim: int


@dataclass(frozen=True)
class Size:
    """Batch rows, queries and keys of one case."""

    batch: int
    queries: int
    keys: int


SHAPES = {
    "D 64": Shape("D 64", 32, 32, 64),
    "D 128": Shape("D 128", 16, 16, 128),
    "grouped": Shape("grouped", 64, 8, 128),
}
TOY_SHAPE = Shape("toy", 2, 1, 16)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True)
class Mask:
    """A mask as `attention` takes it, and as a function of batch row, head, query and key for FlexAttention.

    Attributes:
        visible: how many entries of one head are visible, by which work is counted.
        flag: what `scaled_dot_product_attention` has for it: False for nothing hidden, True for causality, else None.
    """

    name: str
    options: Callable[[Size, str], Options]
    modifier: Callable[[Size, str], Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] | None
    visible: Callable[[Size], float]
    flag: bool | None = None


def window_of(size: Size) -> int:
    """Keys of a sliding window."""
    return max(2, min(1024, size.keys // 4))


def prefix_of(size: Size) -> int:
    """Keys that everything sees."""
    return max(1, size.keys // 4)


def documents(size: Size) -> list[int]:
    """Where packed documents end; they are of different lengths."""
    parts = [3, 1, 5, 2, 8, 4, 6, 3]
    ends = [sum(parts[: number + 1]) * size.keys // sum(parts) for number in range(len(parts))]
    return sorted(set(ends))


def ids(size: Size, device: str) -> Tensor:
    """[batch, keys], which document a token is of."""
    ends = torch.tensor(documents(size), device=device)
    one = torch.searchsorted(ends, torch.arange(size.keys, device=device), right=True)
    return one.expand(size.batch, -1).contiguous()


def causal_entries(size: Size) -> float:
    """Queries times the protocol's mean number of keys."""
    return size.queries * (max(0, size.keys - size.queries) + size.keys) / 2


def _window_entries(size: Size, first: int) -> float:
    window = window_of(size)
    return float(sum(min(i + 1, window + min(first, max(0, i + 1 - window))) for i in range(size.keys)))


def _document_entries(size: Size) -> float:
    ends = documents(size)
    lengths = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return sum(n * (n + 1) / 2 for n in lengths)


def _prefix_entries(size: Size) -> float:
    prefix = prefix_of(size)
    return float(sum(max(i + 1, prefix) for i in range(size.keys)))


def _packed(size: Size, device: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    document = ids(size, device)
    return lambda b, h, i, j: (i >= j) & (document[b, i] == document[b, j])


SINKS = 4
MASKS = {
    mask.name: mask
    for mask in (
        Mask("full", lambda s, d: {}, None, lambda s: float(s.queries * s.keys), flag=False),
        Mask("causal", lambda s, d: {"causal": True}, lambda s, d: lambda b, h, i, j: i >= j, causal_entries, True),
        Mask(
            "sliding window",
            lambda s, d: {"causal": True, "window": window_of(s)},
            lambda s, d: lambda b, h, i, j: (i >= j) & (i - j < window_of(s)),
            lambda s: _window_entries(s, 0),
        ),
        Mask("packed documents", lambda s, d: {"causal": True, "segments": ids(s, d)}, _packed, _document_entries),
        Mask(
            "prefix",
            lambda s, d: {"causal": True, "prefix": torch.full((s.batch,), prefix_of(s), device=d)},
            lambda s, d: lambda b, h, i, j: (i >= j) | (j < prefix_of(s)),
            _prefix_entries,
        ),
        Mask(
            "sink + window",
            lambda s, d: {"causal": True, "window": window_of(s), "first_tokens": SINKS},
            lambda s, d: lambda b, h, i, j: (i >= j) & ((i - j < window_of(s)) | (j < SINKS)),
            lambda s: _window_entries(s, SINKS),
        ),
    )
}

ROWS = {"lse": True, "entropy": True, "max_probability": True}
OFF = "statistics off"
BACKWARD = "backward"


def forward_emits(size: Size, device: str) -> dict[str, Emit]:
    """What a forward is asked for, by the name in the table."""
    generator = torch.Generator(device).manual_seed(2)
    probes = torch.randn(size.keys, 16, generator=generator, device=device)
    return {
        OFF: Emit(),
        "row statistics": Emit(**ROWS),
        "+ collision": Emit(**ROWS, collision=True),
        "+ collision, argmax": Emit(**ROWS, collision=True, argmax=True),
        "row statistics, 16 key probes": Emit(**ROWS, key_probes=probes),
    }


def logarithmic_edges(size: Size) -> list[int]:
    """0, 1, 2, 4 ... up to beyond the longest distance, as the library bins offsets."""
    return [0, *(1 << power for power in range(math.ceil(math.log2(size.keys)) + 1))]


def pass_emits(size: Size) -> dict[str, Emit]:
    """What the statistics pass is asked for alone."""
    block = max(16, size.keys // 256)
    return {
        "pass: key sums, pooled map, logarithmic offsets": Emit(
            key_sum=True, pool=block, offsets=logarithmic_edges(size)
        ),
        "pass: key sums": Emit(key_sum=True),
        "pass: key sums, squares, maxima": Emit(key_sum=True, key_square=True, key_max=True),
        "pass: exact offsets": Emit(offsets=list(range(min(size.keys, 4096) + 1))),
    }


@dataclass
class Inputs:
    """Random q, k, v and what comes back through the output, none of it zeros."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        self.scale = 1 / math.sqrt(self.q.shape[-1])

    @classmethod
    def draw(cls, shape: Shape, size: Size, dtype: torch.dtype, device: str) -> Inputs:
        """The same numbers for the same sizes."""
        generator = torch.Generator(device).manual_seed(0)

        def numbers(heads: int, length: int) -> Tensor:
            drawn = torch.randn(size.batch, heads, length, shape.head_dim, generator=generator, device=device)
            return drawn.to(dtype)

        return cls(
            q=numbers(shape.heads, size.queries), k=numbers(shape.key_heads, size.keys),
            v=numbers(shape.key_heads, size.keys), grad=numbers(shape.heads, size.queries),
        )  # fmt: skip

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """What attention reads."""
        return self.q, self.k, self.v


class UnsuitedError(RuntimeError):
    """A peer that is not asked, with the reason."""


def visible_matrix(mask: Mask, size: Size, device: str) -> Tensor:
    """[batch, 1, queries, keys], built from the mask's own definition."""
    assert mask.modifier is not None
    b, i, j = (torch.arange(n, device=device) for n in (size.batch, size.queries, size.keys))
    position = i + size.keys - size.queries
    return mask.modifier(size, device)(b[:, None, None, None], b[:1], position[:, None], j)


def fused(backend: SDPBackend, x: Inputs, mask: Mask, size: Size) -> Callable[[], Tensor]:
    """`scaled_dot_product_attention` through one backend."""
    square = size.queries == size.keys
    causal = mask.flag is True and square
    seen = None
    if mask.flag is None or (mask.flag is True and not square):
        if max(size.queries, size.keys) > MASK_LENGTH:
            raise UnsuitedError(f"its boolean matrix is not formed beyond {MASK_LENGTH} tokens")
        seen = visible_matrix(mask, size, str(x.q.device))
    grouped = x.q.shape[1] != x.k.shape[1]

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                *x.qkv, attn_mask=seen, is_causal=causal, enable_gqa=grouped, scale=x.scale
            )

    return run


def flex(x: Inputs, mask: Mask, size: Size, compiled: bool) -> Callable[[], Tensor]:
    """FlexAttention with the block mask of the same mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device, block = str(x.q.device), None
    if mask.modifier is not None:
        rows = None if mask.name != "packed documents" else size.batch
        long = compiled and size.keys > MASK_LENGTH
        make = torch.compile(create_block_mask, dynamic=False) if long else create_block_mask
        block = make(mask.modifier(size, device), rows, None, size.queries, size.keys, device=device)
    call = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    grouped = x.q.shape[1] != x.k.shape[1]
    return lambda: call(*x.qkv, block_mask=block, enable_gqa=grouped, scale=x.scale)


def materialised(x: Inputs, mask: Mask, size: Size) -> Callable[[], Tensor]:
    """Eager scores, softmax, entropy and column sums, each over the whole matrix, as transformers' `eager` does it."""
    heads, device = x.q.shape[1], x.q.device
    need = 6 * size.batch * heads * size.queries * size.keys * x.q.element_size()
    if device.type == "cuda" and need > torch.cuda.mem_get_info()[0]:
        raise UnsuitedError(f"its matrices would take {need / 2**30:.0f} GiB")
    additive = None
    if mask.modifier is not None:
        seen = visible_matrix(mask, size, str(device))
        additive = torch.zeros(seen.shape, dtype=x.q.dtype, device=device).masked_fill_(~seen, -math.inf)

    def run() -> Tensor:
        k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (x.k, x.v))
        scores = x.q @ k.mT * x.scale
        if additive is not None:
            scores = scores + additive
        a = torch.softmax(scores, -1, dtype=torch.float32).to(x.q.dtype)
        -(a * torch.log(a + 1e-12)).sum(-1)
        a.sum(-2)
        return a @ v

    return run

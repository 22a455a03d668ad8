"""What a tile hides, as numbers to add: 0 where a query sees a key, -inf where not (backend `tiled`).

Filling by a boolean mask takes torch up to 5 ns an entry on a processor, more than a whole softmax; an addition takes
0.2. Positions hide only the edges of a tile, and always alike, so those numbers are kept from tile to tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from attnlab_kernels.problem import Problem
from attnlab_kernels.tile_parts import Hiding
from attnlab_kernels.workspace import Workspace


def without_idle_masks(block: Problem) -> Problem:
    """A block without the masks that hide nothing in it."""
    key_mask, mask, queries, keys = block.key_mask, block.mask, block.query_segments, block.key_segments
    if key_mask is not None and bool(key_mask.all()):
        block = replace(block, key_mask=None)
    if mask is not None and bool(mask.all()):
        block = replace(block, mask=None)
    if queries is not None and keys is not None and queries.numel() and keys.numel():
        one = queries[:, :1]
        if bool((queries == one).all()) and bool((keys == one).all()):
            block = replace(block, query_segments=None, key_segments=None)
    return block


def hidden_parts(block: Problem, work: Workspace, number: int = 0) -> Iterator[Hiding]:
    """Ranges of a block's keys in which entries are hidden, numbers [b or 1, h or 1, i or 1, j or 1].

    A bias hides by itself. Some numbers are buffers, which hold until the next tile; blocks of one tile differ in their
    `number`.
    """
    causality = block.causal and block.window is None and block.prefix is None
    for keys, numbers in _hidden_by_position(block, work):
        yield Hiding(keys.start, keys.stop, numbers, added=False, by_causality=causality)

    def everywhere(numbers: Tensor) -> Hiding:
        return Hiding(0, block.keys, numbers, added=False, by_causality=False)

    if block.key_mask is not None:
        yield everywhere(additive(block.key_mask, block.dtype)[:, None, None])
    if block.query_segments is not None and block.key_segments is not None:
        seen = block.query_segments[:, None, :, None] == block.key_segments[:, None, None]
        yield everywhere(additive(seen, block.dtype, work, f"segments {number}"))
    if block.mask is not None:
        yield everywhere(additive(block.mask, block.dtype, work, f"mask {number}"))


def additive(visible: Tensor, dtype: torch.dtype, work: Workspace | None = None, name: str = "") -> Tensor:
    """0 where True, -inf where False: the bits of -inf are those of minus one, moved past the mantissa.

    Example:
        >>> additive(torch.tensor([True, False]), torch.float32).tolist()
        [0.0, -inf]
    """
    whole, mantissa = (torch.int64, 52) if dtype == torch.float64 else (torch.int32, 23)
    minus_one = visible.view(torch.int8) - 1
    unit = torch.full((1,), 1 << mantissa, dtype=whole, device=visible.device)
    into = None if work is None else work.take(name, *visible.shape).view(whole)
    return torch.mul(minus_one, unit, out=into).view(dtype)


def _hidden_by_position(block: Problem, work: Workspace) -> Iterator[tuple[slice, Tensor]]:
    """Causality and window leave a middle in which every entry is visible, prefix and first tokens a head."""
    n_k = block.keys
    if not n_k or not block.queries or block.positions_all_visible():
        return
    left, right, first = 0, n_k, 0
    if block.causal:
        right = _within(block.offset + 1, n_k)
    if block.window is not None:
        left = _within(block.queries + block.offset - block.window, n_k)
        right = min(right, _within(block.offset + block.window, n_k))
        first = min(block.first_tokens, right if block.causal else n_k)
    if block.prefix is not None and block.batch:
        first = max(first, int(block.prefix.min()))
    first = _within(first, n_k)
    middle = slice(left, max(left, right))
    if middle.start == middle.stop or first >= middle.stop:
        parts = [slice(first, n_k)]
    elif first >= middle.start:
        parts = [slice(middle.stop, n_k)]
    else:
        parts = [slice(first, middle.start), slice(middle.stop, n_k)]
    for part in parts:
        if part.start < part.stop:
            hidden = _hidden_in(block, part, work)
            if hidden is not None:
                yield part, hidden


def _hidden_in(block: Problem, part: slice, work: Workspace) -> Tensor | None:
    keys = part.stop - part.start
    first = _within(block.first_tokens - part.start, keys)
    prefix = None if block.prefix is None else tuple(_within(p - part.start, keys) for p in block.prefix.tolist())

    def make() -> Tensor | None:
        every = slice(0, block.batch), slice(0, block.key_heads), slice(0, block.queries)
        piece = replace(
            block.cut(*every, part), query_segments=None, key_segments=None, key_mask=None, mask=None, bias=None
        )
        visible = piece.visible()
        return None if visible is None else additive(visible, block.dtype)

    return work.keep((block.offset - part.start, block.queries, keys, first, prefix), make)


def _within(place: int, length: int) -> int:
    return max(0, min(place, length))

"""Buffers that the tiles of one core reuse (backend `tiled`): scores, masks and biases by distance."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from attnlab_kernels.problem import Problem, relative_buckets

KEPT = 4
"""Small tensors that depend on distances alone and serve many tiles, as the mask of a causal diagonal does."""


class Workspace:
    """Buffers that every tile reuses."""

    def __init__(self, problem: Problem) -> None:
        self._dtype, self._device = problem.dtype, problem.q.device
        self._buffers: dict[str, Tensor] = {}
        self._kept: dict[object, Tensor | None] = {}
        self._stairs: dict[str, tuple[object, Tensor]] = {}
        # Without a window a tile's distances may be any of the problem's; with one most tiles have the same few.
        everything = problem.offset + problem.queries, problem.queries + problem.keys
        self._span = everything if problem.window is None else None

    def take(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor of this shape; a later call with this name may reuse its memory."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=self._dtype, device=self._device)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)

    def keep(self, key: object, make: Callable[[], Tensor | None]) -> Tensor | None:
        """What `make` gives, or what it gave for this key not long ago."""
        if key not in self._kept:
            if len(self._kept) >= KEPT:
                self._kept.clear()
            self._kept[key] = make()
        return self._kept[key]

    def distances(self, block: Problem) -> Tensor:
        """[1, i, j], |i + offset - j|."""
        return self._stair("distances", None, block, lambda distance: distance.abs()[None])

    def relative_bias(self, block: Problem) -> Tensor:
        """[h, i, j], T5's bias."""
        assert block.relative_bias is not None
        table, bidirectional, max_distance = block.relative_bias

        def read(distance: Tensor) -> Tensor:
            return table[relative_buckets(-distance, table.shape[0], bidirectional, max_distance)].T

        return self._stair("relative", (table.data_ptr(), table.shape), block, read)

    def _stair(self, name: str, of: object, block: Problem, read: Callable[[Tensor], Tensor]) -> Tensor:
        """[*, i, j] of what `read` makes of distances i + offset - j.

        Tiles that differ in their offset are windows of one matrix, whose row r has distance r + base in column 0.
        """
        base, width = (block.offset, block.keys) if self._span is None else self._span
        held, stair = self._stairs.get(name, (None, None))
        if stair is None or held != (of, base, width) or stair.shape[-2] < block.queries:
            rows = block.queries
            line = read(base + rows - 1 - torch.arange(width + rows - 1, device=self._device)).to(self._dtype)
            stair = line.new_empty(*line.shape[:-1], rows, width)
            for row in range(rows):
                stair[..., row, :] = line[..., rows - 1 - row : rows - 1 - row + width]
            self._stairs[name] = (of, base, width), stair
        start = base - block.offset
        return stair[..., : block.queries, start : start + block.keys]

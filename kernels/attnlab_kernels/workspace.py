"""Buffers that the tiles of one core reuse (backend `tiled`): scores, masks and biases by distance."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from attnlab_kernels.problem import Problem, relative_buckets

KEPT = 4
"""Small tensors that depend on distances alone and serve many tiles, as the mask of a causal diagonal does."""


SPARE_BYTES = 1 << 26
"""Memory that calls leave behind for the next: fresh memory costs a processor more than the softmax written to it."""


class _Spares:
    """Buffers of calls that are over."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: list[tuple[torch.dtype, str, Tensor]] = []

    def borrow(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """One buffer for each name, as far as there are any."""
        with self._lock:
            found = {name: buffer for kind, name, buffer in self._held if kind == dtype}
            self._held = [held for held in self._held if not any(held[2] is buffer for buffer in found.values())]
        return found

    def give_back(self, buffers: dict[str, Tensor]) -> None:
        """Keep these, and of what was kept before as much as there is room for."""
        with self._lock:
            kept = [(buffer.dtype, name, buffer) for name, buffer in buffers.items()] + self._held
            self._held, room = [], SPARE_BYTES
            for held in kept:
                if held[2].nbytes <= room:
                    room -= held[2].nbytes
                    self._held.append(held)


_spares = _Spares()


class Workspace:
    """Buffers that every tile reuses.

    Attributes:
        flushes: whether this core counts numbers too small to be normal as zero.
        large: whether a strip's logits were found to be, so that its next tiles need not try again what failed.
    """

    def __init__(self, problem: Problem, flushes: bool = False) -> None:
        self.flushes = flushes
        self.large = False
        self._dtype, self._device = problem.dtype, problem.q.device
        self._buffers = _spares.borrow(self._dtype) if self._device.type == "cpu" else {}
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
            # Another call may borrow it, inside inference mode or not.
            with torch.inference_mode(False):
                buffer = torch.empty(size, dtype=self._dtype, device=self._device)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)

    def begin(self) -> None:
        """Forget what was found of the strip before: results are not to depend on which core ran what."""
        self.large = False

    def release(self) -> None:
        """Leave the buffers to later calls; this workspace is not used again."""
        if self._device.type == "cpu":
            _spares.give_back(self._buffers)
        self._buffers = {}

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

"""Cutting the data in chunks, and a chunk in batches.

A chunk is a fixed number of sequences, the unit that is written to disk. Inside a chunk the sequences are taken by
length, so that a batch has little padding; both depend on the lengths and the settings alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnlab.runs.analysis import Batch
from attnlab.runs.data import Sequences

BATCH_TOKENS = {"cpu": 4096}
"""Padded tokens a batch by type of device: enough for the matrices, small enough to stay near the cache."""
_BATCH_TOKENS_ELSEWHERE = 16384
_CHUNK_TOKENS = 16384
_MOST_CHUNKS = 512


class Plan(NamedTuple):
    """How the data is cut.

    Attributes:
        batch_size: most sequences in a batch, or None where `batch_tokens` alone decides.
        batch_tokens: most padded tokens in a batch of more than one sequence, None where `batch_size` was given.
        chunk_size: sequences in a chunk.
    """

    batch_size: int | None
    batch_tokens: int | None
    chunk_size: int


def make_plan(lengths: Sequence[int], batch_size: int | None, device_type: str) -> Plan:
    """The plan for sequences of these `lengths`.

    >>> make_plan([100] * 1000, None, "cpu")
    Plan(batch_size=None, batch_tokens=4096, chunk_size=163)
    >>> make_plan([100] * 1000, 400, "cpu").chunk_size
    400
    """
    total = sum(lengths)
    chunk_tokens = max(_CHUNK_TOKENS, -(-total // _MOST_CHUNKS))
    chunk_size = max(1, chunk_tokens * len(lengths) // max(total, 1), batch_size or 1)
    if batch_size is not None:
        return Plan(batch_size, None, chunk_size)
    return Plan(None, BATCH_TOKENS.get(device_type, _BATCH_TOKENS_ELSEWHERE), chunk_size)


def chunks_of(count: int, chunk_size: int) -> list[range]:
    """The numbers of the sequences of each chunk."""
    return [range(start, min(start + chunk_size, count)) for start in range(0, count, chunk_size)]


def batches_of(chunk: range, lengths: Sequence[int], plan: Plan) -> list[tuple[int, ...]]:
    """The numbers of the sequences of each batch of a chunk, longest first.

    >>> batches_of(range(4), [3, 9, 3, 9], Plan(None, 20, 4))
    [(1, 3), (0, 2)]
    """
    order = sorted(chunk, key=lambda i: (-lengths[i], i))
    batches: list[tuple[int, ...]] = []
    current: list[int] = []
    for i in order:
        longest = lengths[current[0]] if current else 0
        full = plan.batch_size is not None and len(current) >= plan.batch_size
        heavy = plan.batch_tokens is not None and longest * (len(current) + 1) > plan.batch_tokens
        if current and (full or heavy):
            batches.append(tuple(current))
            current = []
        current.append(i)
    if current:
        batches.append(tuple(current))
    return batches


def make_batch(sequences: Sequences, index: tuple[int, ...], pad_id: int, device: torch.device) -> Batch:
    """The sequences `index` as one batch, padded on the right."""
    input_ids, mask = _padded([sequences.ids[i] for i in index], pad_id, device)
    if sequences.decoder_ids is None:
        return Batch(index, input_ids, mask)
    decoder_ids, decoder_mask = _padded([sequences.decoder_ids[i] for i in index], pad_id, device)
    return Batch(index, input_ids, mask, decoder_ids, decoder_mask)


def batches(sequences: Sequences, chunk: range, plan: Plan, pad_id: int, device: torch.device) -> Iterator[Batch]:
    """The batches of a chunk, one at a time."""
    for index in batches_of(chunk, sequences.lengths, plan):
        yield make_batch(sequences, index, pad_id, device)


def _padded(rows: Sequence[np.ndarray], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=bool)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = row
        mask[b, : len(row)] = True
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)

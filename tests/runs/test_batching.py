"""Chunks and batches: every sequence once, in an order that the lengths alone decide."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnlab.runs.batching import batches_of, chunks_of, make_batch, make_plan
from attnlab.runs.data import Sequences

LENGTHS = st.lists(st.integers(1, 9000), min_size=1, max_size=80)


@given(lengths=LENGTHS, batch_size=st.none() | st.integers(1, 10))
def test_every_sequence_is_in_one_batch_and_no_batch_is_too_large(lengths: list[int], batch_size: int | None) -> None:
    plan = make_plan(lengths, batch_size, "cpu")
    seen = []
    for chunk in chunks_of(len(lengths), plan.chunk_size):
        for batch in batches_of(chunk, lengths, plan):
            seen.extend(batch)
            padded = len(batch) * max(lengths[i] for i in batch)
            assert batch_size is None or len(batch) <= batch_size
            assert batch_size is not None or len(batch) == 1 or padded <= 4096
    assert sorted(seen) == list(range(len(lengths)))


@given(lengths=LENGTHS)
def test_a_large_data_set_has_no_more_than_some_hundred_chunks(lengths: list[int]) -> None:
    many = lengths * 200
    assert len(chunks_of(len(many), make_plan(many, None, "cpu").chunk_size)) <= 1100


def test_a_batch_is_padded_on_the_right() -> None:
    sequences = Sequences("two", (np.array([5, 6, 7]), np.array([8])), (np.array([1]), np.array([2, 3])))
    batch = make_batch(sequences, (1, 0), 9, torch.device("cpu"))
    assert batch.index == (1, 0)
    assert batch.input_ids.tolist() == [[8, 9, 9], [5, 6, 7]]
    assert batch.attention_mask.tolist() == [[True, False, False], [True, True, True]]
    assert batch.decoder_input_ids is not None
    assert batch.decoder_input_ids.tolist() == [[2, 3], [1, 9]]

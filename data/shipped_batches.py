"""The batches that the shipped model learns from: text, and sequences made so that only copying from context helps.

An induction head needs another head that finds the previous token, and neither pays without the other: on text and
repeated random tokens alone this model stayed on a plateau for as long as it was tried. So each half is made worth
learning by itself. An *echo* is `a b a` again and again, with new tokens each time: the third is the token before the
one at hand, whatever they are. *Recall* is pairs `a b` in random order (Arora et al. 2023,
https://arxiv.org/abs/2312.04927): a pair's second token is known where the first has been seen, at no fixed distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

IGNORED = -100
SPECIAL = 3
ECHO, SHORTEST_PERIOD, SHORTEST_PIECE, MOST_PAIRS = 3, 6, 8, 32


class Stage(NamedTuple):
    """A part of training: its steps, the shape of its batches, and which shares of the sequences are made up.

    What is left is plain text.
    """

    steps: int
    rows: int
    length: int
    echo: float
    recall: float
    random_repeats: float
    text_repeats: float


STAGES = (
    Stage(1000, 32, 64, echo=0.30, recall=0.35, random_repeats=0.05, text_repeats=0.0),
    Stage(1100, 14, 256, echo=0.05, recall=0.10, random_repeats=0.15, text_repeats=0.15),
    Stage(1100, 8, 512, echo=0.02, recall=0.03, random_repeats=0.10, text_repeats=0.15),
)


class Batch(NamedTuple):
    """Token ids [B, N], and what to learn of them: the same ids, or -100 where a token cannot be known."""

    ids: Tensor
    labels: Tensor


def stream_of(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Return the tokens of the texts one after another, each text with its end and without a start, [tokens]."""
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([np.array([*ids, tokenizer.eos_token_id]) for ids in encoded])


class Source:
    """Draws sequences from one long stream of encoded text and from the vocabulary.

    Example:
        >>> source = Source(np.arange(3, 2000), vocabulary=2048, start_token=0, seed=0)
        >>> source.batch(STAGES[0], step=0).ids.shape
        torch.Size([32, 64])
    """

    def __init__(self, stream: np.ndarray, vocabulary: int, start_token: int, seed: int) -> None:
        self.stream = stream
        self.vocabulary = vocabulary
        self.start_token = start_token
        self.seed = seed

    def batch(self, stage: Stage, step: int) -> Batch:
        """Draw the batch of one step; the same step always gets the same batch."""
        rng = np.random.default_rng([self.seed, step])
        pairs = [self._sequence(rng, stage) for _ in range(stage.rows)]
        start = ((0, 0), (1, 0))
        ids = np.pad(np.stack([ids for ids, _ in pairs]), start, constant_values=self.start_token)
        labels = np.pad(np.stack([labels for _, labels in pairs]), start, constant_values=IGNORED)
        return Batch(torch.from_numpy(ids), torch.from_numpy(labels))

    def _sequence(self, rng: np.random.Generator, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        room = stage.length - 1
        kind = rng.choice(5, p=[*(shares := stage[3:]), 1 - sum(shares)])
        if kind == 0:
            return self._echo(rng, room)
        if kind == 1:
            return self._recall(rng, room)
        ids = (self._random_repeat, self._text_repeat, self._text)[kind - 2](rng, room)
        return ids, ids

    def _text(self, rng: np.random.Generator, count: int) -> np.ndarray:
        start = rng.integers(len(self.stream) - count)
        return self.stream[start : start + count]

    def _echo(self, rng: np.random.Generator, room: int) -> tuple[np.ndarray, np.ndarray]:
        ids = rng.integers(SPECIAL, self.vocabulary, (room // ECHO + 1, ECHO))
        ids[:, 2] = ids[:, 0]
        labels = ids.copy()
        labels[:, :2] = IGNORED
        return ids.reshape(-1)[:room], labels.reshape(-1)[:room]

    def _recall(self, rng: np.random.Generator, room: int) -> tuple[np.ndarray, np.ndarray]:
        count = int(rng.integers(2, min(MOST_PAIRS, room // 4) + 1))
        pairs = SPECIAL + rng.choice(self.vocabulary - SPECIAL, (count, 2), replace=False)
        order = rng.integers(count, size=room // 2 + 1)
        ids = pairs[order]
        labels = ids.copy()
        labels[:, 0] = IGNORED
        labels[np.unique(order, return_index=True)[1]] = IGNORED
        return ids.reshape(-1)[:room], labels.reshape(-1)[:room]

    def _random_repeat(self, rng: np.random.Generator, room: int) -> np.ndarray:
        period = int(np.exp(rng.uniform(np.log(SHORTEST_PERIOD), np.log(room // 2 + 1))))
        return np.resize(rng.integers(SPECIAL, self.vocabulary, period), room)

    def _text_repeat(self, rng: np.random.Generator, room: int) -> np.ndarray:
        piece = self._text(rng, int(rng.integers(SHORTEST_PIECE, room // 3)))
        before, between = (int(size) for size in rng.multinomial(room - 2 * len(piece), [1 / 3] * 3)[:2])
        parts = [self._text(rng, before), piece, self._text(rng, between), piece]
        return np.concatenate([*parts, self._text(rng, room - sum(map(len, parts)))])

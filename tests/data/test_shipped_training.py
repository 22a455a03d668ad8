"""How the shipped model is trained: what it may learn from, what its batches ask, and how a stopped run goes on."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

MODEL = Path(__file__).parents[2] / "data" / "models" / "pydoc-4l"
MODULES = (
    "shipped_corpus", "shipped_batches", "shipped_tokenizers", "training", "nordstrom_robinson", "circuit_parts",
)  # fmt: skip
VOCABULARY, START, IGNORED = 2048, 0, -100
Script = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def batches(script: Script) -> ModuleType:
    return script("shipped_batches")


def only(batches: ModuleType, **share: float) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels of a batch that holds one kind of sequence only."""
    none = dict.fromkeys(("echo", "recall", "random_repeats", "text_repeats"), 0.0)
    stage = batches.Stage(steps=1, rows=24, length=64, **{**none, **share})
    source = batches.Source(np.arange(3, VOCABULARY).repeat(2), VOCABULARY, START, seed=0)
    drawn = source.batch(stage, step=0)
    return drawn.ids.numpy(), drawn.labels.numpy()


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_the_scripts_run(script: Script, name: str) -> None:
    found = doctest.testmod(script(name))
    assert found.attempted > 0
    assert found.failed == 0


def test_an_echo_asks_for_the_token_before_the_one_at_hand(batches: ModuleType) -> None:
    ids, labels = only(batches, echo=1.0)
    rows, columns = np.nonzero(labels != IGNORED)
    assert len(rows) == 24 * 21
    assert (ids[rows, columns] == ids[rows, columns - 2]).all()


def test_recall_asks_only_for_what_followed_the_same_token_before(batches: ModuleType) -> None:
    ids, labels = only(batches, recall=1.0)
    asked = np.argwhere(labels != IGNORED)
    assert len(asked) > 0
    for row, column in asked:
        earlier = np.flatnonzero(ids[row, : column - 1] == ids[row, column - 1])
        assert len(earlier) > 0
        assert (ids[row, earlier + 1] == ids[row, column]).all()


def test_a_random_repeat_is_periodic_and_a_repeated_piece_comes_twice(batches: ModuleType) -> None:
    ids, _ = only(batches, random_repeats=1.0)
    for row in ids[:, 1:]:
        assert any((row[period:] == row[:-period]).all() for period in range(6, 33))
    ids, labels = only(batches, text_repeats=1.0)
    assert (labels[:, 1:] == ids[:, 1:]).all()
    for row in ids:
        places = {tuple(row[i : i + 8]): i for i in range(len(row) - 7)}
        assert any(places[tuple(row[i : i + 8])] >= i + 8 for i in range(len(row) - 7))


def test_a_stream_is_the_texts_one_after_another_with_their_ends(batches: ModuleType) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    stream = batches.stream_of(["One.", "Two, three."], tokenizer)
    assert tokenizer.decode(stream) == "One.</s>Two, three.</s>"


def test_nothing_held_out_is_learned_from(script: Script) -> None:
    corpus = script("shipped_corpus")
    twin = "This very paragraph stands in two documents, and is long enough to be worth telling apart. " * 3
    documents = corpus.topics()
    kept = next(document.source for document in documents if corpus.is_held_out(document.source))
    learned = next(document.source for document in documents if not corpus.is_held_out(document.source))
    own = "Only here does this stand. " * 10
    parts = corpus.split([corpus.Document(learned, twin), corpus.Document(kept, f"{twin}\n\n{own}")])
    assert [document.source for document in parts.train] == [learned]
    assert parts.held_out == [corpus.Document(kept, own)]


def test_a_stopped_training_goes_on_to_the_same_weights(script: Script, batches: ModuleType, tmp_path: Path) -> None:
    new_model, training = script("train_pydoc_4l").new_model, script("training")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    stage = batches.Stage(steps=4, rows=2, length=40, echo=0.2, recall=0.2, random_repeats=0.2, text_repeats=0.2)
    source = batches.Source(np.arange(3, VOCABULARY), VOCABULARY, START, seed=0)

    def steps(model: torch.nn.Module, optimizers: tuple[torch.optim.Optimizer, ...], numbers: range) -> None:
        for step in numbers:
            drawn = source.batch(stage, step)
            loss = model(input_ids=drawn.ids, labels=drawn.labels).loss
            training.descend(loss, model, optimizers, (5e-3, 1e-3))

    whole = new_model(tokenizer, seed=0)
    optimizers = training.new_optimizers(whole)
    steps(whole, optimizers, range(2))
    training.save_checkpoint(tmp_path, whole, optimizers, training.Progress(2, 1.5))
    steps(whole, optimizers, range(2, 4))

    resumed = new_model(tokenizer, seed=1)
    optimizers = training.new_optimizers(resumed)
    assert training.load_checkpoint(tmp_path, resumed, optimizers) == training.Progress(2, 1.5)
    steps(resumed, optimizers, range(2, 4))
    pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)

"""Sentences of a made-up language with their translation and gold word alignment, drawn without end.

A ground truth for cross-attention: where should a decoder look as it writes a word? The languages are those of
`attnlab.tasks.grammar`; `aligner`, which ships with attnlab, was trained on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attnlab.errors import DataError
from attnlab.tasks.alignment import Reading, alignment_error, words_of_rows
from attnlab.tasks.base import ragged, read_count
from attnlab.tasks.draw import Deck, Part, is_held_out, read_templates
from attnlab.tasks.grammar import (
    ADJECTIVES,
    DETERMINERS,
    FILLERS,
    NOUNS,
    ORDERS,
    PARTICLES,
    PREPOSITIONS,
    TENSES,
    TIMES,
    VERBS,
    Clause,
    NounPhrase,
    SentencePair,
    write,
)

IGNORED = -100
"""Fills up labels, as the losses of transformers expect."""
_MOST_ADJECTIVES = 2


@dataclass(frozen=True, eq=False)
class Translations:
    """Sentence pairs in token ids, one token a word, each side ended by the end token.

    Position t of `labels` is target word t and position s of `input_ids` source word s, so the links of `pairs` are
    links of tokens. Row t of the decoder predicts word t, and reads word t - 1 (the first reads the start token).

    Attributes:
        pairs: [E] the sentences as words, with the gold alignment.
        input_ids, attention_mask: [E, N] the source, padded on the right.
        labels: [E, M] the target, filled up with -100.
        decoder_input_ids, decoder_attention_mask: [E, M] the target behind the start token.
    """

    pairs: tuple[SentencePair, ...] = field(repr=False)
    input_ids: Int[Tensor, "E N"]
    attention_mask: Bool[Tensor, "E N"]
    labels: Int[Tensor, "E M"]
    decoder_input_ids: Int[Tensor, "E M"]
    decoder_attention_mask: Bool[Tensor, "E M"]

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """A forward's arguments, teacher forced."""
        names = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
        return {name: getattr(self, name) for name in names}

    @property
    def records(self) -> list[dict[str, str]]:
        """Objects with `text` and `target`, as `attnlab.analyze` and JSON lines take them."""
        return [{"text": pair.text, "target": pair.target_text} for pair in self.pairs]

    def error(self, keys: Int[Tensor, "E H M"], reading: Reading = "predicts") -> Float[Tensor, " H"]:
        """The alignment error rate of each head (`attnlab.tasks.alignment.alignment_error`).

        Args:
            keys: [E, H, M] the source position at which each decoder row looks most, such as the `argmax` of a captured
                cross-attention call on `inputs`.
            reading: which row stands for a target word: the one that `predicts` it, or the one that `reads` it.

        Example:
            >>> import attnlab
            >>> from attnlab.tasks import translations
            >>> model = attnlab.load_model("aligner", device="cpu")
            >>> data = translations(model, 32, words="held_out")
            >>> with torch.inference_mode(), attnlab.capture(model, emit=attnlab.Emit(argmax=True)) as session:
            ...     _ = model.hf(**data.inputs)
            >>> errors = [data.error(call.emitted.argmax) for call in session.calls if call.kind == "cross"]
            >>> [len(heads) for heads in errors], bool(torch.stack(errors).min() < 0.2)
            ([4, 4], True)
        """
        return alignment_error(words_of_rows(keys.transpose(0, 1), reading), self.pairs)


def sentence_pairs(
    n: int, *, seed: int | Sequence[int] = 0, words: Part = "all", templates: Part | Sequence[int] = "all"
) -> tuple[SentencePair, ...]:
    """Sentences with their translation and alignment, without a tokenizer.

    Numbers of phrases (three, four, five) come equally often, and so do orders of as many phrases, words of a list,
    tenses, and noun phrases with no, one and two adjectives; half of the sentences have a filler.

    Args:
        n: number of pairs.
        seed: of all that is drawn, as numpy takes it.
        words: which combinations of words. Adjective and noun, verb and agent, verb and patient are a held-out
            combination where the sum of their numbers in their lists is one of `attnlab.tasks.draw`. A sentence of
            the part `train` has none, one of `held_out` no other; `all` has both.
        templates: which orders of phrases: numbers in `grammar.ORDERS`, or a part.

    Raises:
        ValueError: an argument that is no such thing.

    Example:
        >>> pair = sentence_pairs(1, seed=3)[0]
        >>> print(pair.text, pair.target_text, sep=chr(10))
        will lift last year by every cook with a strange lamp near some old sheep
        lastyear-n sheep-u old-o some-a near-e cook-u every-a lamp-u strange-o with-e lift-il ya
    """
    rng = np.random.default_rng(seed)
    draw = _Clauses(rng, words, read_templates(templates, len(ORDERS)))
    return tuple(write(draw.clause()) for _ in range(read_count(n)))


def translations(
    tokenizer: Any,
    n: int = 64,
    *,
    seed: int | Sequence[int] = 0,
    words: Part = "all",
    templates: Part | Sequence[int] = "all",
    start: int | None = None,
) -> Translations:
    """Sentences with their translation and alignment, in the token ids of a model.

    Args:
        tokenizer: of transformers, or a `Model` that has one; it has to know each word of the grammar as one token.
        n: number of pairs.
        seed: of all that is drawn.
        words: which combinations of words, see `sentence_pairs`.
        templates: which orders of phrases, by number or part.
        start: token that the decoder begins with; None is the padding token, as in Marian's models.

    Raises:
        DataError: the tokenizer does not know a word, or has no end or padding token.
        ValueError: an argument that is no such thing.

    Example:
        >>> from attnlab import load_model
        >>> data = translations(load_model("aligner"), 4, templates="held_out")
        >>> data.input_ids.shape[0], data.records[0]["target"].split()[-1]
        (4, 'ya')
    """
    held = getattr(tokenizer, "tokenizer", None)
    own = tokenizer if held is None else held
    if not hasattr(own, "convert_tokens_to_ids"):
        raise DataError(
            f"tokenizer is a {type(tokenizer).__name__}; expected a tokenizer of transformers, or a Model with one."
        )
    pairs = sentence_pairs(n, seed=seed, words=words, templates=templates)
    return in_token_ids(own, pairs, start)


def in_token_ids(tokenizer: Any, pairs: Sequence[SentencePair], start: int | None = None) -> Translations:
    """Sentence pairs in token ids; see `translations`.

    Raises:
        DataError: the tokenizer does not know a word, or has no end or padding token.
    """
    end, pad, unknown = tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id
    if end is None or pad is None:
        raise DataError("The tokenizer has no end token or no padding token; translations need both.")
    sides = []
    for lines in ([pair.source for pair in pairs], [pair.target for pair in pairs]):
        ids = [tokenizer.convert_tokens_to_ids(list(line)) for line in lines]
        several = ((word, i) for line, of in zip(lines, ids, strict=True) for word, i in zip(line, of, strict=True))
        missing = next((word for word, i in several if i is None or i == unknown), None)
        if missing is not None:
            raise DataError(
                f"The tokenizer does not know the word {missing!r} as a token; that of aligner knows all of them."
            )
        sides.append([[*line, end] for line in ids])
    source, target = sides
    begun = [[pad if start is None else start, *line[:-1]] for line in target]
    return Translations(
        pairs=tuple(pairs),
        input_ids=ragged(source, pad),
        attention_mask=_visible(source),
        labels=ragged(target, IGNORED),
        decoder_input_ids=ragged(begun, pad),
        decoder_attention_mask=_visible(target),
    )


def _visible(lines: Sequence[Sequence[int]]) -> Tensor:
    lengths = torch.tensor([len(line) for line in lines])
    return torch.arange(int(lengths.max())) < lengths[:, None]


class _Clauses:
    """Draws clauses, balanced."""

    def __init__(self, rng: np.random.Generator, words: Part, orders: Iterable[int]) -> None:
        if words not in ("train", "held_out", "all"):
            raise ValueError(f"The part is {words!r}; expected 'train', 'held_out' or 'all'.")
        self._rng = rng
        self._not_nouns = _unfit(words, len(VERBS), len(NOUNS))
        self._not_adjectives = _unfit(words, len(NOUNS), len(ADJECTIVES))
        by_length: dict[int, list[int]] = {}
        for order in orders:
            by_length.setdefault(len(ORDERS[order]), []).append(order)
        self._lengths = Deck(rng, sorted(by_length))
        self._orders = {length: Deck(rng, of) for length, of in by_length.items()}
        roles = ("agent", "patient", "place")
        self._nouns = {role: Deck(rng, range(len(NOUNS))) for role in roles}
        self._counts = {role: Deck(rng, range(_MOST_ADJECTIVES + 1)) for role in roles}
        self._adjectives, self._verbs = Deck(rng, range(len(ADJECTIVES))), Deck(rng, range(len(VERBS)))
        self._determiners, self._prepositions = Deck(rng, DETERMINERS), Deck(rng, PREPOSITIONS)
        self._times, self._tenses = Deck(rng, TIMES), Deck(rng, tuple(TENSES))
        self._particles = Deck(rng, PARTICLES)
        self._fillers = Deck(rng, (*FILLERS, *[""] * len(FILLERS)))

    def clause(self) -> Clause:
        order = self._orders[self._lengths.draw()].draw()
        kinds, verb = ORDERS[order], self._verbs.draw()
        wrong = self._not_nouns[verb]
        agent = self._nouns["agent"].draw(but=wrong)
        patient = self._nouns["patient"].draw(but=[*wrong, agent])
        place = self._nouns["place"].draw(but=[agent, patient]) if "place" in kinds else None
        return Clause(
            order=order,
            agent=self._phrase("agent", agent),
            patient=self._phrase("patient", patient),
            verb=VERBS[verb],
            tense=self._tenses.draw(),
            particle=self._particles.draw(),
            place=None if place is None else self._phrase("place", place),
            preposition="" if place is None else self._prepositions.draw(),
            time=self._times.draw() if "time" in kinds else "",
            filler=self._fillers.draw(),
            filler_at=int(self._rng.integers(len(kinds) + 1)),
        )

    def _phrase(self, role: str, noun: int) -> NounPhrase:
        wrong, chosen = self._not_adjectives[noun], list[int]()
        for left in reversed(range(self._counts[role].draw())):
            # "hot" right before "dog" would read as the idiom.
            idiom = [i for i, word in enumerate(ADJECTIVES) if left == 0 and f"{word} {NOUNS[noun]}" in NOUNS]
            chosen.append(self._adjectives.draw(but=[*wrong, *chosen, *idiom]))
        return NounPhrase(self._determiners.draw(), tuple(ADJECTIVES[i] for i in chosen), NOUNS[noun])


def _unfit(part: Part, of: int, others: int) -> list[list[int]]:
    """For each number of a list of length `of`, the numbers of another list that a part does not combine with it."""
    return [
        [i for i in range(others) if part != "all" and is_held_out(number + i) != (part == "held_out")]
        for number in range(of)
    ]

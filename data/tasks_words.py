"""The `tasks` model's vocabulary, and plain sentences in which it meets every word of the tasks.

Words that are held out from the tasks' prompts (see `attnlab.tasks.draw`) still have to be known words: a name, a
colour, a plural. They are learned here, in sentences that are no prompts of any task: no sentence names anybody twice,
asks for a colour, gives a span of years, or has a noun between subject and verb.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from string import Formatter

import numpy as np
from shipped_tokenizers import wrapped
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from attnlab.tasks import words
from attnlab.tasks.agreement import TEMPLATES as AGREEMENT
from attnlab.tasks.colored_objects import TEMPLATES as COLORED_OBJECTS
from attnlab.tasks.docstring import TEMPLATES as SHAPES
from attnlab.tasks.docstring import template
from attnlab.tasks.draw import part_of
from attnlab.tasks.greater_than import TEMPLATES as GREATER_THAN
from attnlab.tasks.ioi import TEMPLATES as IOI

SPECIAL = ("<s>", "</s>", "<pad>", "<unk>")
PIECES = r'"""|\n|[A-Za-z]+|\d\d|\d|[^\sA-Za-z\d]'
PREPOSITIONS = ("near", "behind", "with", "beside", "of", "in front of", "under", "above", "from", "at")
SENTENCES = (
    "{name} is here.", "I saw {name} today.", "My friend {name} likes the {place}.", "{name} and {other} went home.",
    "{name} met {other} at the {place}.", "Then {name} found a {gift}.", "{name} is a friend of {other}.",
    "The {gift} is for {name}.", "We gave it to {name}.", "They were working with {name} and {other}.",
    "They had a lot of fun with {name}.", "This is a letter from {name} to {other}.", "{name} said that it was late.",
    "The {object} is {color}.", "A {color} {object} is on the floor.", "I like {color} and {color2}.",
    "It has a {color} {object} and a {color2} one.", "The color {color} is not {color2}.", "I have a {object}.",
    "The {event} was long.", "After the {event} came a {event2}.", "Nobody liked the {event}.",
    "The {event} of {year} was short.", "It was the year {year}.", "In {year} the {event} began.",
    "Set {argument} to None.", "The {argument} and the {argument2} are given.", "Return the {argument}.",
    "This {one} is here.", "These {several} are here.", "One {one} and two {several2}.",
    "A {one} and many {several2}.", "There is a {one}.", "There are {several}.", "I saw one {one}.",
    "I saw many {several}.", "It {verb_one}.", "They {verb}.", "He {verb_one} and she {verb_one2}.",
    "We {verb} and they {verb2}.", "This one {verb_one}.", "The {one} {verb_one}.", "The {several} {verb}.",
    "This {one} {verb_one}.", "These {several} {verb}.", "Today the {one} {verb_one}.", "Today the {several} {verb}.",
    "These two {verb}.", "It is {preposition} the {place}.",
    "We are {preposition} the {place}.", "The {description} and the {description2}.",
    "In the end it was a {description}.", "Today it is {color}.",
)  # fmt: skip


HELD_OUT = 4
"""How many times as often as another word a held-out one fills a field: it is in no prompt that is learned from."""


@cache
def fillings() -> dict[str, tuple[str, ...]]:
    """Every field of the sentences with the words that fill it, each as many times as it should come.

    A field and the same with a 2 are filled alike.
    """
    known = {
        "name": words.NAMES, "other": words.NAMES, "place": words.PLACES, "gift": words.GIFTS, "object": words.OBJECTS,
        "color": words.COLORS, "event": words.EVENTS, "argument": words.ARGUMENTS, "description": words.DESCRIPTIONS,
        "one": tuple(noun.one for noun in words.NOUNS), "several": tuple(noun.several for noun in words.NOUNS),
        "verb_one": tuple(verb.one for verb in words.VERBS), "verb": tuple(verb.several for verb in words.VERBS),
    }  # fmt: skip
    oftener = {field: (*several, *(HELD_OUT - 1) * part_of(several, "held_out")) for field, several in known.items()}
    return oftener | {"year": tuple(f"{year}" for year in range(1100, 1800)), "preposition": PREPOSITIONS}


def sentence(rng: np.random.Generator) -> str:
    """One plain sentence; no word fills two of its fields.

    Example:
        >>> sentence(np.random.default_rng(0)).endswith(".")
        True
    """
    known, taken = fillings(), list[str]()
    frame = SENTENCES[rng.integers(len(SENTENCES))]
    fields = [field for _, field, _, _ in Formatter().parse(frame) if field is not None]
    for field in fields:
        several = known[field.removesuffix("2")]
        word = several[rng.integers(len(several))]
        while word in taken:
            word = several[rng.integers(len(several))]
        taken.append(word)
    return frame.format(**dict(zip(fields, taken, strict=True)))


def _task_texts() -> Iterator[str]:
    """Texts that together hold every word of the prompts and of the plain sentences."""
    docstrings = [template(shape) for shape in SHAPES]
    for text in (*IOI, *GREATER_THAN, *COLORED_OBJECTS, *AGREEMENT, *docstrings, *SENTENCES):
        yield " ".join(literal for literal, _, _, _ in Formatter().parse(text))
    for several in fillings().values():
        yield " ".join(several)
    yield " ".join(f"{number:02d}" for number in range(100)) + " 0 1 2 3 4 5 6 7 8 9"


def new_tokenizer(texts: Sequence[str], size: int, context: int) -> PreTrainedTokenizerFast:
    """A tokenizer of words, signs and pairs of digits: all of the tasks', and the texts' most frequent ones.

    A text's spaces are lost, and a word that is not among them is `<unk>`. Sequences begin with `<s>`.
    """
    split = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)

    def pieces(text: str) -> list[str]:
        return [piece for piece, _ in split.pre_tokenize_str(text)]

    needed = dict.fromkeys(SPECIAL) | dict.fromkeys(piece for text in _task_texts() for piece in pieces(text))
    counted = Counter(piece for text in texts for piece in pieces(text))
    frequent = sorted(counted, key=lambda piece: (-counted[piece], piece))
    kept = [*needed, *(piece for piece in frequent if piece not in needed)][:size]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(kept)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    return wrapped(tokenizer, context)

"""Indirect object identification: "When Mary and John went to the store, John gave a drink to" -> " Mary".

"Interpretability in the Wild" (arXiv 2211.00593). The indirect object (IO) is named once, the subject (S) twice; in
half of the prompts IO comes first (ABBA), in half S (BABA). The corrupted prompt is the paper's ABC: three other names,
none of them twice. The templates are our own, of the paper's two clauses.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, Literal

import numpy as np

from attnlab.tasks.base import Example, TaskPrompts, in_tokens, read_count
from attnlab.tasks.draw import Deck, Part, part_of, read_templates
from attnlab.tasks.tokens import Encoder, render
from attnlab.tasks.words import GIFTS, NAMES, PLACES

TEMPLATES = (
    "When {A} and {B} went to the {place}, {S2} gave a {gift} to",
    "Then, {A} and {B} went to the {place}. {S2} gave a {gift} to",
    "After {A} and {B} met at the {place}, {S2} gave the {gift} to",
    "While {A} and {B} were working at the {place}, {S2} gave a {gift} to",
    "When {A} and {B} found a {gift} at the {place}, {S2} decided to give it to",
    "Then, {A} and {B} had a long talk about the {gift}. Afterwards {S2} said to",
    "Friends {A} and {B} found a {gift} at the {place}. {S2} gave it to",
    "After the lunch, {A} and {B} went to the {place}. {S2} handed a {gift} to",
    "Afterwards, {A} and {B} met at the {place}. {S2} wanted to give a {gift} to",
    "Then, {A} and {B} were thinking about going to the {place}. {S2} handed the {gift} to",
    "The {place} that {A} and {B} went to had a {gift}. {S2} gave it to",
    "While {A} and {B} were walking to the {place}, {S2} showed a {gift} to",
    "One day {A} and {B} were at the {place}, and {S2} decided to give a {gift} to",
    "Afterwards {A} and {B} had a lot of fun at the {place}. {S2} gave a {gift} to",
    "When {A} and {B} came back from the {place}, {S2} wanted to show the {gift} to",
    "{A} and {B} were friends. One day {S2} gave a {gift} to",
    "At the {place} {A} and {B} found a {gift}, and {S2} handed it to",
    "After {A} and {B} had lunch at the {place}, {S2} showed the {gift} to",
    "While {A} and {B} were at the {place}, {S2} wanted to hand the {gift} to",
    "{A} and {B} went to the {place} with a {gift}. Then {S2} gave it to",
    "When the day was over, {A} and {B} came back. Afterwards {S2} said to",
    "The {gift} that {A} and {B} found was at the {place}. {S2} showed it to",
    "One day {A} and {B} had a talk at the {place}, and then {S2} handed a {gift} to",
    "Friends {A} and {B} went to the {place}. Afterwards {S2} wanted to give the {gift} to",
    "After a long day at the {place}, {A} and {B} were working. {S2} gave the {gift} to",
    "Then {A} met {B} at the {place}, and {S2} gave a {gift} to",
    "When {A} saw {B} at the {place}, {S2} decided to show the {gift} to",
    "{A} came to the {place} with {B}. There {S2} gave a {gift} to",
    "While {A} was at the {place} with {B}, {S2} handed the {gift} to",
    "One day {A} had lunch with {B}, and {S2} decided to give the {gift} to",
    "There was a {gift} at the {place}. {A} and {B} saw it, and {S2} gave it to",
    "The day that {A} met {B} at the {place}, {S2} said to",
    "After {A} and {B} came to the {place}, {S2} showed a {gift} to",
    "At lunch {A} and {B} had a long talk, and {S2} wanted to show the {gift} to",
    "Afterwards {A} and {B} were walking to the {place} with a {gift}. {S2} handed it to",
    "Then, {A} was at the {place} with {B}. {S2} decided to hand the {gift} to",
    "When {A} came back with {B}, {S2} wanted to give the {gift} to",
    "Afterwards, {A} and {B} found a {gift}. {S2} decided to show it to",
    "Then {A} and {B} met at the {place}, and {S2} decided to give a {gift} to",
    "While {A} was walking to the {place} with {B}, {S2} showed the {gift} to",
)
"""`A` and `B` are IO and S1 in one order or the other."""

Order = Literal["both", "ABBA", "BABA"]
_NEEDED = 5


def ioi(
    tokenizer: Any,
    n: int = 64,
    *,
    seed: int = 0,
    words: Part = "all",
    templates: Part | Sequence[int] = "all",
    order: Order = "both",
    bos: bool | None = None,
) -> TaskPrompts:
    """Prompts of indirect object identification.

    Positions are `IO`, `S1`, `S2` and `END`; the metric is the logit of IO less that of S. Each template comes in both
    orders equally often, and every name equally often as IO and as S (counts differ by two or so).

    Args:
        tokenizer: of transformers, or a `Model` that has one.
        n: number of prompts.
        seed: of all that is drawn; the same seed gives the same prompts.
        words: part of the list of names, see `attnlab.tasks.draw`. Places and gifts are not split.
        templates: part of the templates, or their numbers.
        order: IO first (`ABBA`), S first (`BABA`), or both in turn.
        bos: whether prompts begin with the start token; None leaves that to the tokenizer.

    Raises:
        DataError: the tokenizer has too few names that are one token, or does not know a prompt's words.
        ValueError: an argument that is no such thing.

    Example:
        >>> from attnlab.tasks.ioi import TEMPLATES
        >>> TEMPLATES[0].format(A="Mary", B="John", S2="John", place="store", gift="drink")
        'When Mary and John went to the store, John gave a drink to'
    """
    if order not in ("both", "ABBA", "BABA"):
        raise ValueError(f"order is {order!r}; expected 'both', 'ABBA' or 'BABA'.")
    encoder, rng = Encoder(tokenizer, bos), np.random.default_rng(seed)
    ids = encoder.words(part_of(NAMES, words), "names", _NEEDED, "IOI")
    names = list(ids)
    objects, subjects, others = (Deck(rng, names) for _ in range(3))
    places, gifts = Deck(rng, PLACES), Deck(rng, GIFTS)
    orders = ("ABBA", "BABA") if order == "both" else (order,)
    forms = Deck(rng, list(product(read_templates(templates, len(TEMPLATES)), orders)))
    examples = []
    for _ in range(read_count(n)):
        number, variant = forms.draw()
        io = objects.draw()
        s = subjects.draw(but=[io])
        third = others.several(3, but=[io, s])
        at = {"IO": "A", "S1": "B"} if variant == "ABBA" else {"IO": "B", "S1": "A"}
        common = {"place": places.draw(), "gift": gifts.draw()}
        clean = {at["IO"]: io, at["S1"]: s, "S2": s, **common}
        corrupted = {at["IO"]: third[0], at["S1"]: third[1], "S2": third[2], **common}
        ours, theirs = (render(TEMPLATES[number], fields) for fields in (clean, corrupted))
        examples.append(Example(ours, theirs, [ids[io]], [ids[s]], {**at, "S2": "S2"}, number, variant))
    return in_tokens("ioi", encoder, examples, "logit_difference")

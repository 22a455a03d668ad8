"""Subject-verb agreement across an attractor: "The author near the guards" -> " laughs", not " laugh".

"Assessing the ability of LSTMs to learn syntax-sensitive dependencies" (arXiv 1611.01368), and the pairs of "Causal
analysis of syntactic agreement mechanisms" (arXiv 2106.06087): in the corrupted prompt the subject is in the other
number and all else stays. An attractor is a noun of the other number between subject and verb.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, Literal

import numpy as np

from attnlab.tasks.base import Example, TaskPrompts, in_tokens, read_count
from attnlab.tasks.draw import Deck, Part, part_of, read_templates
from attnlab.tasks.tokens import Encoder, render
from attnlab.tasks.words import NOUNS, VERBS, Forms

TEMPLATES = (
    "The {subject} near the {attractor}",
    "The {subject} behind the {attractor}",
    "The {subject} with the {attractor}",
    "The {subject} beside the {attractor}",
    "The {subject} that saw the {attractor}",
    "The {subject} that the {attractor} saw",
    "The {subject} of the {attractor}",
    "Today the {subject} near the {attractor}",
    "The {subject} in front of the {attractor}",
    "The {subject} that the {attractor} found",
    "The {subject} under the {attractor}",
    "The {subject} that found the {attractor}",
    "The {subject} above the {attractor}",
    "In the end the {subject} behind the {attractor}",
    "The {subject} from the {attractor}",
    "Today the {subject} beside the {attractor}",
    "Today the {subject} under the {attractor}",
    "In the end the {subject} with the {attractor}",
    "Today the {subject} that found the {attractor}",
    "The {subject} at the end of the {attractor}",
    "Today the {subject} of the {attractor}",
    "In the end the {subject} that the {attractor} saw",
    "The {subject} at the {attractor}",
    "In the end the {subject} near the {attractor}",
    "Today the {subject} from the {attractor}",
    "The {subject} on top of the {attractor}",
    "The {subject} next to the {attractor}",
    "Today the {subject} at the end of the {attractor}",
    "In the end the {subject} beside the {attractor}",
    "The {subject} on the side of the {attractor}",
)
Attractor = Literal["opposite", "same", "both"]
_NEEDED = 2


def subject_verb_agreement(
    tokenizer: Any,
    n: int = 64,
    *,
    seed: int = 0,
    words: Part = "all",
    templates: Part | Sequence[int] = "all",
    attractor: Attractor = "opposite",
    bos: bool | None = None,
) -> TaskPrompts:
    """Prompts of subject-verb agreement.

    Positions are `subject`, `attractor` and `END`, which is the attractor where nothing comes after it. The metric is
    the logit of the verb in the subject's number less that of the same verb in the other number. Subjects are singular
    and plural equally often, in every template; `variants` has the numbers of subject and attractor, such as `one
    several`.

    Args:
        tokenizer: of transformers, or a `Model` that has one.
        n: number of prompts.
        seed: of all that is drawn.
        words: part of the lists of nouns and verbs, see `attnlab.tasks.draw`.
        templates: part of the templates, or their numbers.
        attractor: its number beside the subject's.
        bos: whether prompts begin with the start token; None leaves that to the tokenizer.

    Raises:
        DataError: the tokenizer has too few nouns or verbs of which both forms are one token, or does not know a
            prompt's words.
        ValueError: an argument that is no such thing.

    Example:
        >>> from attnlab import load_model
        >>> prompts = subject_verb_agreement(load_model("pydoc-4l"), 4, templates=[6])
        >>> [text.split()[:1] for text in prompts.texts], sorted(set(prompts.variants))
        ([['The'], ['The'], ['The'], ['The']], ['one several', 'several one'])
    """
    if attractor not in ("opposite", "same", "both"):
        raise ValueError(f"attractor is {attractor!r}; expected 'opposite', 'same' or 'both'.")
    encoder, rng = Encoder(tokenizer, bos), np.random.default_rng(seed)
    ids: dict[str, int] = {}
    nouns, verbs = (
        _known(encoder, ids, part_of(several, words), what) for several, what in ((NOUNS, "nouns"), (VERBS, "verbs"))
    )
    same = {"opposite": (False,), "same": (True,), "both": (False, True)}[attractor]
    forms = Deck(rng, list(product(read_templates(templates, len(TEMPLATES)), (0, 1), same)))
    subjects, between, predicates = Deck(rng, nouns), Deck(rng, nouns), Deck(rng, verbs)
    examples = []
    for _ in range(read_count(n)):
        number, many, alike = forms.draw()
        noun = subjects.draw()
        other, verb = between.draw(but=[noun]), predicates.draw()
        its = many if alike else 1 - many
        fixed = {"attractor": other[its]}
        ours, theirs = (render(TEMPLATES[number], {**fixed, "subject": noun[i]}) for i in (many, 1 - many))
        variant = " ".join(Forms._fields[i] for i in (many, its))
        places = {"subject": "subject", "attractor": "attractor"}
        answers, wrong = [ids[verb[many]]], [ids[verb[1 - many]]]
        examples.append(Example(ours, theirs, answers, wrong, places, number, variant))
    return in_tokens("subject_verb_agreement", encoder, examples, "logit_difference")


def _known(encoder: Encoder, ids: dict[str, int], words: Sequence[Forms], what: str) -> list[Forms]:
    """The words of which both forms are one token; their ids are added to `ids`."""
    found = encoder.words([form for both in words for form in both], what, 0, "agreement")
    kept = [both for both in words if both.one in found and both.several in found]
    encoder.require(len(kept), len(words), f"{what} in both numbers", _NEEDED, "subject-verb agreement")
    ids |= found
    return kept

"""Tokens as a reader should see them: leading spaces and line ends as glyphs, split characters put together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnlab.models import Model

_GLYPHS = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍", "\u00a0": "⍽", "\u2028": "⏎", "\u2029": "⏎"})
_LONGEST_CHARACTER = 4
REST = "⋯"
"""Stands for the tokens after the first of a character that takes several."""


def token_labels(model: Model, ids: Sequence[int]) -> list[str]:
    """How each token of a sequence is shown; ids as they are for a model without a tokenizer."""
    texts = model.layout.tokens
    if texts is None or model.tokenizer is None:
        return [str(i) for i in ids]
    labels = [texts[i] if i < len(texts) else str(i) for i in ids]
    return [readable(text) for text in _joined(labels, ids, model)]


def readable(text: str) -> str:
    """White space as glyphs, control characters by their code, an empty token as such.

    >>> readable(" the"), readable("\\n\\n"), readable("\\x07"), readable("")
    ('·the', '⏎⏎', '\\\\x07', '∅')
    """
    if not text:
        return "∅"
    shown = text.translate(_GLYPHS)
    inner = shown.strip(" ")
    if not inner:
        return "·" * len(shown)
    start, end = len(shown) - len(shown.lstrip(" ")), len(shown) - len(shown.rstrip(" "))
    shown = "·" * start + inner + "·" * end
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]", _code, shown)


def _code(match: re.Match[str]) -> str:
    """A control or direction character by its number: it would be unseen, or turn the text around."""
    number = ord(match[0])
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


def _joined(labels: list[str], ids: Sequence[int], model: Model) -> list[str]:
    """Runs of tokens that are parts of characters: the first shows the text of all, the others `REST`."""
    shown = list(labels)
    place = 0
    while place < len(labels):
        if "\ufffd" not in labels[place]:
            place += 1
            continue
        for length in range(2, 2 * _LONGEST_CHARACTER + 1):
            part = list(ids[place : place + length])
            text = model.tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if len(part) == length and "\ufffd" not in text:
                shown[place : place + length] = [text, *[REST] * (length - 1)]
                place += length - 1
                break
        place += 1
    return shown

"""The text of each vocabulary entry, for display.

Tokenizers write spaces and bytes in stand-in characters: byte-level BPE maps each byte to a printable one (GPT-2's
`bytes_to_unicode`), SentencePiece writes a space as U+2581 and lone bytes as `<0x0A>`.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@cache
def _byte_of_character() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def token_texts(tokenizer: Any, size: int) -> tuple[str, ...]:
    """The text of the ids 0 to `size` - 1; ids that the tokenizer does not know are empty.

    Bytes that are no whole character show as U+FFFD.
    """
    known = min(size, len(tokenizer))
    pieces = [piece or "" for piece in tokenizer.convert_ids_to_tokens(list(range(known)))]
    special = set(tokenizer.all_special_tokens)
    byte_level = sum("Ġ" in piece for piece in pieces) > sum("▁" in piece for piece in pieces)
    texts = [piece if piece in special else _text(piece, byte_level) for piece in pieces]
    return (*texts, *[""] * (size - known))


def _text(piece: str, byte_level: bool) -> str:
    if byte_level and all(c in _byte_of_character() for c in piece):
        return bytes(_byte_of_character()[c] for c in piece).decode("utf-8", errors="replace")
    lone = _BYTE.fullmatch(piece)
    if lone:
        return bytes([int(lone[1], 16)]).decode("utf-8", errors="replace")
    return piece.replace("▁", " ")

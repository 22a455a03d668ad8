"""The tokenizers of the models that ship: what all of them have, and the one that is learned from text.

Special tokens are written alike in all of them; where there is a `<s>`, every sequence begins with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

START = "<s>"
SPECIAL = {"bos_token": START, "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
"""How special tokens are written, by transformers' names."""


def wrapped(tokenizer: Tokenizer, length: int, **more: Any) -> PreTrainedTokenizerFast:
    """Return it as transformers' tokenizer, with those of the special tokens that are in its vocabulary.

    Args:
        tokenizer: with its vocabulary; if that has `<s>`, its sequences begin with it from now on.
        length: the most tokens that its model takes.
        more: what else transformers' tokenizer is given.

    Example:
        >>> wrapped(Tokenizer(models.WordLevel({"<s>": 0, "yes": 1})), 8)("yes").input_ids
        [0, 1]
    """
    if (start := tokenizer.token_to_id(START)) is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{START} $A", pair=f"{START} $A $B", special_tokens=[(START, start)]
        )
    special = {name: token for name, token in SPECIAL.items() if tokenizer.token_to_id(token) is not None}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=length, clean_up_tokenization_spaces=False, **special, **more
    )


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Return the ids of the start, the end and padding, of those that it has, by the names that configurations use."""
    found = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {name: number for name, number in found.items() if number is not None}


def train_tokenizer(texts: Iterable[str], vocabulary: int, length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE whose sequences begin with `<s>`; any text survives encoding and decoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [SPECIAL[name] for name in ("bos_token", "eos_token", "pad_token")]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return wrapped(tokenizer, length)

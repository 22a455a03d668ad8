"""How a trained model's folder is written: weights in half precision, to be run in full."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast


def write_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
    """Write the model's weights and configurations, and its tokenizer; the model is in half precision afterwards."""
    model.half().save_pretrained(folder)
    model.config.dtype = "float32"  # stored in half the bytes, run in full precision
    model.config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)

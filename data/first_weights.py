"""The weights that the trained models begin with, where they are not those of transformers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from transformers import LlamaForCausalLM

WRITTEN = 0.3
"""Which share of what it reads a head begins by writing, in `look_for_the_like`."""


def draw_for_width(model: LlamaForCausalLM, parts: tuple[str, ...]) -> None:
    """Draw the weights whose names have one of these parts anew, by chance, so that what they make is of size 1."""
    for name, weight in model.named_parameters():
        if any(part in name for part in parts):
            nn.init.normal_(weight, std=model.config.hidden_size**-0.5)


@torch.no_grad()
def look_for_the_like(layers: Iterable[nn.Module]) -> None:
    """Make each head of a Llama's layers look for tokens like its own, and write a share of what it reads.

    As in "Mimetic initialization of self-attention layers" (arXiv 2305.09828), its queries and keys begin alike, and
    its output projection as a share of its value projection, turned round.
    """
    for layer in layers:
        attention = layer.self_attn
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        attention.o_proj.weight.copy_(WRITTEN * attention.v_proj.weight.T)

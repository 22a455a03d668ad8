"""`load_model` for TransformerLens: a bridge as the transformers model inside it, a HookedTransformer as it is."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attnlab.errors import UnsupportedModelError
from attnlab.lens.parts import lens_style
from attnlab.models.model import Model, digest_weights
from attnlab.runs.analysis import Batch

_POSITIONS = 256
"""Positions whose logits are held at once."""


class BridgeModel(Model):
    """A `TransformerBridge`: `hf` is the transformers model inside it, whose parts are the bridge's components.

    Attributes:
        bridge: what `capture` reads, so what layers are numbered by.
    """

    def __init__(self, bridge: Any, *, name: str, tokenizer: Any, max_length: int | None) -> None:
        super().__init__(bridge.original_model, name=name, tokenizer=tokenizer, max_length=max_length)
        self.bridge = bridge

    @property
    def captured(self) -> nn.Module:
        """The bridge."""
        module: nn.Module = self.bridge
        return module


class HookedModel(Model):
    """A `HookedTransformer` or `HookedEncoder`."""

    @property
    def config(self) -> Any:
        """TransformerLens' configuration."""
        return self.hf.cfg

    @property
    def body(self) -> Any:
        """The part whose output the head reads."""
        modules = self.hf._modules
        return modules["ln_final"] if "ln_final" in modules else self.hf.blocks[-1]

    @property
    def is_encoder_decoder(self) -> bool:
        """False: none of these is."""
        return False

    @property
    def vocabulary(self) -> int | None:
        """Number of token ids that it knows."""
        return int(self.config.d_vocab)

    @property
    def has_loss(self) -> bool:
        """Whether it predicts the next token."""
        return bool(self.config.attention_dir == "causal") and hasattr(self.hf, "unembed")

    def fingerprint(self) -> str:
        """SHA-256 of the configuration and of a fixed sample of every weight, the same in every process."""
        config = {key: value for key, value in self.config.to_dict().items() if key not in ("device", "dtype")}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        digest_weights(digest, self.hf.state_dict())
        return digest.hexdigest()

    @torch.no_grad()
    def forward(self, batch: Batch, *, loss: bool = False) -> Tensor | None:
        """Run the model over a batch, see `Model.forward`."""
        self._check_loss(loss)
        ids, mask = batch.input_ids.to(self.device), batch.attention_mask.to(self.device, torch.bool)
        hidden: list[Tensor] = []
        handle = self.body.register_forward_hook(lambda module, args, output: hidden.append(output))
        try:
            if "attention_mask" in type(self.hf).forward.__annotations__:
                self.hf(ids, attention_mask=mask.long(), return_type=None)
            else:
                self.hf(ids, one_zero_attention_mask=mask.long(), return_type=None)
        finally:
            handle.remove()
        return self._loss(hidden[0], ids, mask) if loss else None

    def _loss(self, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        cap = getattr(self.config, "output_logits_soft_cap", None)
        loss = torch.zeros(ids.shape[0], max(ids.shape[1] - 1, 0), device=hidden.device)
        for start in range(0, loss.shape[1], _POSITIONS):
            end = min(start + _POSITIONS, loss.shape[1])
            logits = self.hf.unembed(hidden[:, start:end]).float()
            logits = cap * torch.tanh(logits / cap) if cap is not None and cap > 0 else logits
            targets = ids[:, start + 1 : end + 1]
            flat = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            loss[:, start:end] = flat.view_as(targets)
        return loss.masked_fill(~(mask[:, 1:] & mask[:, :-1]), 0.0)


def lens_model(source: nn.Module, tokenizer: Any, max_length: int | None) -> Model:
    """A TransformerLens module made ready for reading.

    Args:
        source: a `TransformerBridge` of a transformers model, a `HookedTransformer` or a `HookedEncoder`.
        tokenizer: its own when None.
        max_length: the longest sequence; at most the context that the configuration states.

    Raises:
        UnsupportedModelError: it is another kind of module.
    """
    from transformers import PreTrainedModel

    module: Any = source
    name = type(source).__name__
    tokenizer = getattr(module, "tokenizer", None) if tokenizer is None else tokenizer
    stated = getattr(module.cfg, "n_ctx", None)
    limits = [n for n in (stated, max_length) if isinstance(n, int) and n > 0]
    longest = min(limits, default=None)
    if lens_style(source) == "bridge" and isinstance(module.original_model, PreTrainedModel):
        name = getattr(module.cfg, "model_name", None) or name
        return BridgeModel(module, name=name, tokenizer=tokenizer, max_length=longest)
    if any(cls.__name__ in ("HookedTransformer", "HookedEncoder") for cls in type(source).__mro__):
        name = getattr(module.cfg, "model_name", None) or name
        name = type(source).__name__ if name == "custom" else name
        return HookedModel(source, name=name, tokenizer=tokenizer, max_length=longest)
    raise UnsupportedModelError(
        f"load_model takes a HookedTransformer, a HookedEncoder or a TransformerBridge of a transformers model, and "
        f"{name} is none; `capture` may read it as it is."
    )

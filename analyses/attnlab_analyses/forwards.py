"""What experiments read of a forward beside attention: logits at few places, and the last hidden states.

Shapes: B sequences, N tokens, P places, V vocabulary, W width of the stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attnlab.attribution.inside import keeps_positions, run
from attnlab.errors import UnsupportedModelError
from attnlab.lens.model import HookedModel
from attnlab.models.torch_model import TorchModel

if TYPE_CHECKING:
    from attnlab.models import Model


def logits_at(model: Model, ids: Int[Tensor, "B N"], places: Int[Tensor, " P"]) -> Float[Tensor, "B P V"]:
    """Logits of the tokens that follow some places; of the others, where the model can do so, none are computed.

    Args:
        model: predicts the next token.
        ids: sequences of one length.
        places: the same in every sequence.

    Example:
        >>> import attnlab
        >>> model = attnlab.load_model("known-circuit", device="cpu")
        >>> logits_at(model, torch.tensor([[0, 2, 77, 50, 3]]), torch.tensor([4])).argmax(-1).tolist()
        [[77]]
    """
    if isinstance(model, TorchModel):
        return torch.as_tensor(_output(model.hf(ids)))[:, places]
    module = model.captured
    if keeps_positions(module):
        return run(module, ids, None, {}, places)
    return run(module, ids, None, {})[:, places]


def last_hidden(model: Model, ids: Int[Tensor, "B N"]) -> Float[Tensor, "B N W"]:
    """The hidden states that the head over the vocabulary reads, after the last norm; gradients flow.

    Of a torch module that is neither of transformers nor of TransformerLens, they are the input of its last linear map
    onto the vocabulary.

    Raises:
        UnsupportedModelError: it has no such map.

    Example:
        >>> import attnlab
        >>> last_hidden(attnlab.load_model("known-circuit", device="cpu"), torch.tensor([[0, 5]])).shape
        torch.Size([1, 2, 80])
    """
    if isinstance(model, TorchModel):
        heads = [part for part in model.hf.modules() if isinstance(part, nn.Linear)]
        heads = [part for part in heads if part.out_features == model.vocabulary]
        if not heads:
            raise UnsupportedModelError(
                f"{type(model.hf).__name__} has no linear map onto its vocabulary, so its last hidden states are not "
                "known."
            )
        return _caught(model.hf, heads[-1], ids, before=True)
    if isinstance(model, HookedModel):
        return _caught(model.hf, model.body, ids, before=False)
    without = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    hidden: Tensor = model.body(input_ids=ids, **without).last_hidden_state
    return hidden


def _caught(module: nn.Module, part: nn.Module, ids: Tensor, *, before: bool) -> Tensor:
    seen: list[Tensor] = []
    if before:
        handle = part.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    else:
        handle = part.register_forward_hook(lambda _, args, output: seen.append(output))
    try:
        module(ids)
    finally:
        handle.remove()
    return seen[-1]


def _output(returned: Any) -> Any:
    return getattr(returned, "logits", returned)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside the block no weight of the module gathers a gradient."""
    moving = [weight for weight in module.parameters() if weight.requires_grad]
    for weight in moving:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in moving:
            weight.requires_grad_(True)

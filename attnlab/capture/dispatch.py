"""The one attention function and mask function registered with transformers, and which session each call belongs to.

Both are registered as "attnlab" when the first capture begins, never at import. A model is sent here by the
`_attn_implementation` of its configurations, which are put back when the last capture over them ends. Configurations
can be shared with a model that nobody captures, so a call from an unknown module goes to the implementation that was
there before.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from attnlab_kernels import attention
from torch import Tensor, nn

from attnlab.capture.arguments import read_arguments
from attnlab.capture.masks import LazyMask, mask_for

if TYPE_CHECKING:
    from attnlab.capture.session import Session

NAME = "attnlab"


@dataclass
class _Switched:
    """A configuration that sends its model here."""

    config: Any
    original: str | None
    captures: int = 0


_switched: dict[int, _Switched] = {}
_sessions: list[Session] = []


def register() -> None:
    """Make transformers know the name; calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attnlab_attention)
    AttentionMaskInterface.register(NAME, attnlab_mask)


def open_session(session: Session) -> None:
    """Send the model's attention here."""
    register()
    _sessions.append(session)
    for config in _configs(session.model):
        entry = _switched.setdefault(id(config), _Switched(config, config._attn_implementation_internal))
        entry.captures += 1
        session.switched.append(config)
        config._attn_implementation_internal = NAME


def close_session(session: Session) -> None:
    """Give the model its own attention back, unless another capture of it is still open."""
    if session in _sessions:
        _sessions.remove(session)
    while session.switched:
        config = session.switched.pop()
        entry = _switched[id(config)]
        entry.captures -= 1
        if entry.captures <= 0:
            config._attn_implementation_internal = entry.original
            del _switched[id(config)]


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration that a part of the model may read its attention implementation from."""
    from transformers import PretrainedConfig

    waiting = [c for m in model.modules() if isinstance(c := getattr(m, "config", None), PretrainedConfig)]
    found: dict[int, Any] = {}
    while waiting:
        config = waiting.pop()
        if id(config) in found:
            continue
        found[id(config)] = config
        inner = [getattr(config, name, None) for name in config.sub_configs]
        waiting += [c for c in inner if isinstance(c, PretrainedConfig)]
    return list(found.values())


def original_implementation(config: Any) -> str:
    """The implementation that a configuration names when no capture is on."""
    entry = _switched.get(id(config))
    return (entry.original if entry else config._attn_implementation_internal) or "eager"


def attnlab_mask(**arguments: Any) -> Tensor | None:
    """What transformers calls for the mask of a model that is being captured."""
    config = arguments.get("config")
    return mask_for(arguments, may_be_none=config is not None and original_implementation(config) == "sdpa")


def attnlab_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **keywords: Any
) -> tuple[Tensor, None]:
    """What a captured model calls for attention: [B, Nq, Hq, Dv] and no weights, as `sdpa` returns it."""
    sessions = [session for session in _sessions if session.owns(module)]
    out: Tensor | None = None
    for session in reversed(sessions):
        mine = session.attend(module, query, key, value, attention_mask, keywords)
        out = mine if out is None else out
    if out is None:
        out = own_attention(module, query, key, value, attention_mask, keywords)
    return out, None


def own_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, keywords: dict[str, Any]
) -> Tensor:
    """The model's own attention, as it would have been called without a capture."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config: Any = module.config
    implementation = original_implementation(config)
    default: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    function: Any = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, default)
    if isinstance(mask, LazyMask):
        mask = mask.build() if implementation not in _MASKS_OF_THEIR_OWN else mask.build_for(implementation)
    elif mask is not None and mask.dtype == torch.bool and implementation == "eager":
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    if function is None:
        arguments = read_arguments(module, query, key, value, mask, keywords)
        return attention(arguments.q, arguments.k, arguments.v, **arguments.options()).out.transpose(1, 2).contiguous()
    out: Tensor = function(module, query, key, value, mask, **keywords)[0]
    return out


_MASKS_OF_THEIR_OWN = frozenset(
    {"eager", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"}
)

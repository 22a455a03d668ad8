"""The attention components of a TransformerLens model: where each is, and whether a hook wants scores or pattern."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from attnlab.capture.call import Kind
from attnlab.errors import UnsupportedModelError
from attnlab.lens.names import kind_of

_HOMES = {"HookedRootModule": "hooked", "TransformerBridge": "bridge"}
_ATTENTION = ("AbstractAttention", "AttentionBridge")
_POINTS = ("hook_attn_scores", "hook_pattern")
_PLACE = re.compile(r"(?:^|\.)([A-Za-z_]+)\.(\d+)\.([A-Za-z_.]+)$")


@dataclass(frozen=True, eq=False)
class Part:
    """One attention component.

    Attributes:
        module: of TransformerLens.
        path: in the model, what hook names begin with.
        kind, layer: as calls are named; `layer` is the number of the block.
    """

    module: nn.Module
    path: str
    kind: Kind
    layer: int

    @property
    def points(self) -> list[nn.Module]:
        """The hook points of scores and pattern."""
        modules = self.module._modules
        return [point for name in _POINTS if (point := modules.get(name)) is not None]

    @property
    def groups(self) -> int:
        """How many query heads share a key head, where the code repeats key heads for them; 1 where it does not."""
        module: Any = self.module
        if hasattr(type(module), "calculate_attention_scores"):
            return 1 if module.cfg.ungroup_grouped_query_attention else getattr(module, "repeat_kv_heads", 1)
        own: Any = module._modules.get("_original_component")
        found = getattr(own, "num_key_value_groups", None)
        if isinstance(found, int):
            return found
        heads, key_heads = (getattr(module.config, name, None) for name in ("n_heads", "n_key_value_heads"))
        return heads // key_heads if isinstance(heads, int) and isinstance(key_heads, int) and key_heads else 1

    @property
    def direction(self) -> str:
        """`causal` or `bidirectional`, of a component of the Hooked classes."""
        module: Any = self.module
        return getattr(module, "_attention_dir_override", None) or module.cfg.attention_dir


def lens_style(model: object) -> str | None:
    """`hooked` or `bridge` for a TransformerLens model, None for anything else.

    Example:
        >>> lens_style(nn.Linear(1, 1)) is None
        True
    """
    for cls in type(model).__mro__:
        if cls.__module__.partition(".")[0] == "transformer_lens" and cls.__name__ in _HOMES:
            return _HOMES[cls.__name__]
    return None


def parts_of(model: nn.Module) -> list[Part]:
    """The attention components of a TransformerLens model, in the order of its blocks.

    Raises:
        UnsupportedModelError: it has none, or their places cannot be told.
    """
    name = type(model).__name__
    places: dict[int, Part] = {}
    # A bridge has its components twice: in its own tree, and in that of the transformers model.
    for path, module in model.named_modules(remove_duplicate=False):
        place = _place(path) if any(cls.__name__ in _ATTENTION for cls in type(module).__mro__) else None
        if place is not None:
            places.setdefault(id(module), Part(module, path, *place))
    found = list(places.values())
    if not found:
        raise UnsupportedModelError(
            f"{name} has no attention component of TransformerLens in numbered blocks, so attnlab cannot read it."
        )
    twice = [place for place, n in Counter((part.kind, part.layer) for part in found).items() if n > 1]
    if twice:
        kind, layer = twice[0]
        paths = ", ".join(part.path for part in found if (part.kind, part.layer) == twice[0])
        raise UnsupportedModelError(
            f"{name} has several {kind} attention components of layer {layer} ({paths}), and one is expected."
        )
    return found


def _place(path: str) -> tuple[Kind, int] | None:
    if "_original_component" in path:
        return None
    match = _PLACE.search(path)
    return None if match is None else (kind_of(match[1], match[3]), int(match[2]))


def hooks_of(point: nn.Module, ours: frozenset[int] = frozenset()) -> Iterator[object]:
    """The hooks on a hook point, except those with our ids."""
    tables = (
        point._forward_pre_hooks, point._forward_hooks, point._backward_hooks, getattr(point, "_backward_pre_hooks", {})
    )  # fmt: skip
    for table in tables:
        for key, hook in table.items():
            if key not in ours:
                yield hook

"""attnlab's names and TransformerLens' hook names, both ways.

attnlab says (layer, kind, activation), TransformerLens `blocks.5.attn.hook_z`. A hook holds all heads of a layer, on
axis 2 of [B, N, H, D] (on axis 1 of `scores` and `pattern`, [B, H, Nq, Nk]).
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from attnlab.capture.call import Head, Kind
from attnlab.capture.where import read_heads

Style = Literal["bridge", "hooked"]
"""Whose names: `bridge` is `TransformerBridge`, `hooked` is `HookedTransformer` and its kin; most are the same."""

_HOOK_OF = {
    "q": "hook_q",
    "k": "hook_k",
    "v": "hook_v",
    "rot_q": "hook_rot_q",
    "rot_k": "hook_rot_k",
    "scores": "hook_attn_scores",
    "pattern": "hook_pattern",
    "z": "hook_z",
    "result": "hook_result",
}
# What TransformerBridge calls the same points where they are not under their usual names.
_ALSO = {"q.hook_out": "q", "k.hook_out": "k", "v.hook_out": "v", "o.hook_in": "z", "hook_out": "out"}
_ACTIVATION_OF = {hook: name for name, hook in _HOOK_OF.items()} | _ALSO

_PARTS: dict[Style, dict[Kind, tuple[str, str]]] = {
    "bridge": {"encoder": ("encoder_blocks", "attn"), "cross": ("decoder_blocks", "cross_attn")},
    "hooked": {"encoder": ("encoder", "attn"), "cross": ("decoder", "cross_attn")},
}
_STACK, _PART = "blocks|encoder_blocks|decoder_blocks|encoder|decoder", "attn|self_attn|cross_attn"
_PATH = re.compile(rf"({_STACK})\.(\d+)\.(?:({_PART})\.)?(.+)")


class Activation(NamedTuple):
    """What a hook holds: of which layer and kind of attention, under attnlab's name."""

    layer: int
    name: str
    kind: Kind = "self"


def hook_name(
    where: int | str | Head, activation: str, kind: Kind = "self", *, style: Style = "bridge", decoder: bool = False
) -> str:
    """TransformerLens' name of an activation of an attention layer.

    `Call.q` and `Call.k` are as attention received them, so after rotary embedding: `rot_q`, `rot_k` in models with it.

    Args:
        where: a layer, `"L5"`, `"L5H1"` or a `Head` (whose layer counts: a hook holds all heads).
        activation: `q`, `k`, `v`, `rot_q`, `rot_k`, `scores`, `pattern`, `z`, `result`, or `out`, the layer's output.
        kind: of attention.
        style: whose names; they differ in encoder-decoders only.
        decoder: whether `self` means the decoder of an encoder-decoder.

    Raises:
        ValueError: a name that is not known.

    Example:
        >>> hook_name("L5H1", "z"), hook_name(3, "pattern", "cross")
        ('blocks.5.attn.hook_z', 'decoder_blocks.3.cross_attn.hook_pattern')
        >>> hook_name(2, "out")
        'blocks.2.hook_attn_out'
    """
    if activation not in _HOOK_OF and activation != "out":
        raise ValueError(f"The activation is {activation!r}; expected one of {', '.join(_HOOK_OF)}, out.")
    if kind not in ("self", "cross", "encoder") or style not in _PARTS:
        raise ValueError(f"kind is {kind!r} and style {style!r}; expected self, cross or encoder, bridge or hooked.")
    layer = _layer(where)
    if kind != "self":
        stack, part = _PARTS[style][kind]
    elif decoder:
        stack, part = ("decoder_blocks", "self_attn") if style == "bridge" else ("decoder", "attn")
    else:
        stack, part = "blocks", "attn"
    if activation == "out":
        return f"{stack}.{layer}.hook_attn_out" if stack == "blocks" else f"{stack}.{layer}.{part}.hook_out"
    return f"{stack}.{layer}.{part}.{_HOOK_OF[activation]}"


def read_hook_name(name: str) -> Activation:
    """What a hook of an attention layer holds, in attnlab's names.

    Raises:
        ValueError: it is no hook of an attention layer.

    Example:
        >>> read_hook_name("blocks.5.attn.hook_z")
        Activation(layer=5, name='z', kind='self')
        >>> read_hook_name("decoder_blocks.0.cross_attn.o.hook_in")
        Activation(layer=0, name='z', kind='cross')
    """
    match = _PATH.fullmatch(name)
    if match is not None:
        stack, layer, part, hook = match[1], int(match[2]), match[3], match[4]
        found = "out" if part is None and hook == "hook_attn_out" else _ACTIVATION_OF.get(hook) if part else None
        if found is not None:
            return Activation(layer, found, kind_of(stack, part or ""))
    raise ValueError(f"{name!r} is no hook of an attention layer; expected for example 'blocks.5.attn.hook_z'.")


def kind_of(stack: str, part: str) -> Kind:
    """The kind of attention of a stack of blocks (`blocks`, `encoder`, ...) and a part of a block (`attn`, ...)."""
    if "cross" in part:
        return "cross"
    return "encoder" if stack.startswith("encoder") else "self"


def _layer(where: int | str | Head) -> int:
    if isinstance(where, int):
        return where
    layers = list(read_heads(where) or {})
    if len(layers) != 1:
        raise ValueError(f"The layer is {where!r}; expected one, for example 5 or 'L5H1'.")
    return layers[0]

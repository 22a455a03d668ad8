"""Where what a capture keeps of its calls stays: on the device, or on the CPU."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from attnlab.capture.call import Call

Keep = Literal["device", "cpu"]
"""`device`: where the model computed it; `cpu`: copied to the CPU call by call, so a GPU's memory stays free."""

_T = TypeVar("_T")


def kept(call: Call, keep: Keep) -> Call:
    """The call, with all its tensors where `keep` says; gradients flow through the copy.

    Example:
        >>> from attnlab_kernels import Emitted
        >>> from attnlab.capture.call import Site
        >>> site = Site(0, "self", 1, 1, 1, 2, 2, None, None, True, 0, None, torch.device("cpu"))
        >>> kept(Call(site, Emitted(lse=torch.zeros(1, 1, 2)), 1.0), "cpu").emitted.lse.device.type
        'cpu'
    """
    return call if keep == "device" else _on_cpu(call)


def _on_cpu(value: _T) -> _T:
    moved: Any = value
    if isinstance(value, Tensor):
        moved = value.to("cpu")
    elif isinstance(value, torch.device):
        moved = torch.device("cpu")
    elif isinstance(value, tuple):
        moved = tuple(_on_cpu(part) for part in value)
    elif is_dataclass(value) and not isinstance(value, type):
        moved = replace(value, **{f.name: _on_cpu(getattr(value, f.name)) for f in fields(value)})
    found: _T = moved
    return found

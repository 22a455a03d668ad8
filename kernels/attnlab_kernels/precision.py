"""Keeps out what surrounds a call: autocast, which would change the precision, and another current device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """A block in which no operation on tensors of this one's device is lowered to half precision.

    Example:
        >>> a = torch.ones(2, 2)
        >>> with torch.autocast("cpu", torch.bfloat16), without_autocast(a):
        ...     (a @ a).dtype
        torch.float32
    """
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """A block whose current device is this tensor's: triton launches on the current one, wherever the tensors lie."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()

"""Exact attention that emits its statistics without forming the N x N matrix."""

from attnlab_kernels.api import Attention, attention
from attnlab_kernels.emit import Emit, Emitted
from attnlab_kernels.errors import UnsupportedError
from attnlab_kernels.problem import RelativeBias

__all__ = ["Attention", "Emit", "Emitted", "RelativeBias", "UnsupportedError", "attention"]

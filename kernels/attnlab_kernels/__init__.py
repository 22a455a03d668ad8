"""Exact attention that emits its statistics without forming the N x N matrix."""

from attnlab_kernels.api import Attention, attention
from attnlab_kernels.emit import Emit, Emitted
from attnlab_kernels.errors import UnsupportedError
from attnlab_kernels.options import Options
from attnlab_kernels.problem import RelativeBias
from attnlab_kernels.product_request import GradientProducts
from attnlab_kernels.products import gradient_products
from attnlab_kernels.tuning import autotune

__all__ = [
    "Attention",
    "Emit",
    "Emitted",
    "GradientProducts",
    "Options",
    "RelativeBias",
    "UnsupportedError",
    "attention",
    "autotune",
    "gradient_products",
]

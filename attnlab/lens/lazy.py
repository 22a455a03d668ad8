"""`Lazy`: a tensor of scores, weights or masks that TransformerLens' code handles and that nobody has computed yet.

TransformerLens writes attention out: Q K^T, a scale, a mask, a softmax, the product with V. Under a capture the N x N
tensors in between are `Lazy`: they have a shape and a type, know what they mean (`attnlab.lens.terms`) and how they
would be computed, and become real as soon as anything unknown looks at their values. So nothing is lost, and where only
the usual steps follow, the attention kernel computes the end of them in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from attnlab.capture.masks import LazyMask

_PROPERTIES = (
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_cpu", "is_meta", "is_mps",
    "is_nested", "is_sparse", "is_quantized", "is_leaf",
)  # fmt: skip
_METHODS = (
    Tensor.dim, Tensor.size, Tensor.numel, Tensor.__len__, Tensor.is_floating_point, Tensor.is_complex,
    Tensor.ndimension,
)  # fmt: skip
DESCRIPTIONS = frozenset([*_METHODS, *(getattr(Tensor, name).__get__ for name in _PROPERTIES)])
"""What can be asked of a tensor without its values."""


class Recipe(NamedTuple):
    """The operation that computes a tensor."""

    function: Callable[..., Any]
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = {}

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """An argument that may be given by place or by name."""
        return self.args[place] if len(self.args) > place else self.kwargs.get(name, default)


class Lazy(Tensor):
    """A tensor that is not computed yet.

    Attributes:
        term: what it means.
        recipe: how the model would compute it.
    """

    term: Any
    recipe: Recipe
    _value: Tensor | None

    @classmethod
    def of(cls, term: Any, recipe: Recipe, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Self:
        """A tensor with a meaning."""
        made: Self = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        made.term, made.recipe, made._value = term, recipe, None
        return made

    def like(self, term: Any, recipe: Recipe, dtype: torch.dtype | None = None) -> Lazy:
        """Another one of the same shape."""
        return Lazy.of(term, recipe, self.shape, self.dtype if dtype is None else dtype, self.device)

    def made(self) -> Tensor:
        """Its values, computed as the model computes them."""
        if self._value is None:
            function, args, kwargs = self.recipe
            with torch._C.DisableTorchFunction():
                self._value = function(*made_real(args), **made_real(kwargs))
        return self._value

    def become(self, other: Lazy) -> Lazy:
        """Change in place into `other`, which was made from this one."""
        before = Lazy.of(self.term, self.recipe, self.shape, self.dtype, self.device)
        before._value = self._value
        function, args, kwargs = other.recipe
        self.recipe = Recipe(function, [before if arg is self else arg for arg in args], kwargs)
        self.term, self._value = other.term, None
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            return f"Lazy({type(self.term).__name__}, shape={list(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Follow what is known; compute everything else."""
        from attnlab.lens.algebra import follow

        return follow(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """What reaches torch's inside is computed."""
        return func(*made_real(args), **made_real(kwargs or {}))


def made_real(value: Any, masks: bool = True) -> Any:
    """The same arguments with every `Lazy` in them computed, and every `LazyMask` where `masks` says so."""
    if isinstance(value, Lazy):
        return value.made()
    if isinstance(value, LazyMask):
        return value.build() if masks else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(made_real(v, masks) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(made_real(v, masks) for v in value)
    if isinstance(value, Mapping):
        return {k: made_real(v, masks) for k, v in value.items()}
    return value

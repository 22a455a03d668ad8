"""A GPU that is not there: tensors that say `cuda:0`, hold CPU values, and refuse what CUDA refuses.

`pretend_cuda()` makes `device="cuda"` usable on a build of torch without CUDA. What is made there, or moved there, is a
`Pretend`; every operation on one is checked as CUDA checks it and then runs on the values inside.

Refused, as on a GPU:
    - tensors of both devices in one operation, but for CPU numbers of no dimension in pointwise operations, CPU
      indices into a tensor of the device, and `copy_`;
    - `.numpy()`, `np.asarray` and what else reads memory from Python;
    - a generator of the other device;
    - products of matrices of whole numbers, and the operations in `ABSENT`, which have no CUDA kernel.

Not shown: speed, memory, streams and races, rounding and the order of ties as CUDA has them, what graphs capture, more
than one GPU, what compiled kernels do. Triton's kernels run in its interpreter; what is shown of them is that every
tensor that a launch is given lies on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

_STAND_IN, _SAID = torch.device("lazy", 0), torch.device("cuda", 0)
"""What torch's own code takes the device for, and what Python is told.

Autograd runs on `lazy` on every build; on `cuda` it asks for streams, which a build for the CPU does not have.
"""
ABSENT = {"aten::histogram", "aten::_histogramdd_from_bin_cts", "aten::map_", "aten::apply_"}
_PRODUCTS = {f"aten::{name}" for name in ("mm", "bmm", "addmm", "baddbmm", "addbmm", "dot", "vdot", "mv", "addmv")}
_COPIES = {"aten::copy_", "aten::_copy_from", "aten::copy"}
_INDEXED = {"aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class Pretend(torch.Tensor):
    """A tensor of `cuda:0`; its values are `held`, a tensor of the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretend:
        with torch.inference_mode(held.is_inference()):  # a view of what was made outside such a block is as it is
            return torch.Tensor._make_wrapper_subclass(
                cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
                layout=held.layout, device=_STAND_IN,
            )  # fmt: skip

    def __init__(self, held: Tensor) -> None:
        self.held = held

    device = property(lambda self: _SAID)  # type: ignore[assignment]
    is_cuda = True  # type: ignore[assignment]

    def as_subclass(self, cls: type[Tensor]) -> Any:  # type: ignore[override]
        return _there_too(cls)(self.held)

    def get_device(self) -> int:
        return 0

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{self.held!r} on {self.device}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _moved, (self.detach().cpu(),)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_PLAIN = (Pretend, torch.nn.Parameter, torch.nn.Buffer)


class _Operations(TorchDispatchMode):
    """Sees the operations that have no tensor to go by, factories, as well."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not all(kind is Tensor or issubclass(kind, _PLAIN) for kind in types):
            return NotImplemented
        return _run(func, args, kwargs or {})


_MATMUL = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class _Names(TorchFunctionMode):
    """Puts the stand-in where Python code names the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        if func is Tensor.cuda:
            return args[0].to(_STAND_IN)
        if func in _MATMUL and args[0].dim() == 1 and args[1].dim() == 2:
            return (args[0][None] @ args[1])[0]  # torch changes the product's shape in place
        if func in (Tensor.to, torch._C._nn._parse_to):
            args = tuple(map(_stand_in, args))
        elif any(isinstance(each, torch.device) for each in args):
            args = tuple(_stand_in(each) if isinstance(each, torch.device) else each for each in args)
        if "device" in kwargs:
            kwargs = kwargs | {"device": _stand_in(kwargs["device"])}
        return func(*args, **kwargs)


@cache
def _there_too(kind: type[Tensor]) -> type[Pretend]:
    """A subclass of Tensor whose values are on the device."""
    return type(kind.__name__, (kind, Pretend), {})


def _stand_in(device: Any) -> Any:
    named = isinstance(device, torch.device) or (isinstance(device, str) and device.startswith("cuda"))
    return _STAND_IN if named and torch.device(device).type == "cuda" else device


_generator = torch.Generator()
"""The device's own random numbers."""


def _moved(held: Tensor) -> Pretend:
    return Pretend(held)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func.namespace == "attnlab":
        from attnlab_kernels import operator

        run: Callable[..., Any] = {"attention": operator._attention, "attention_backward": operator._backward}[
            func._schema.name.split("::")[1]
        ]
        with _Operations(), _Names():
            return run(*args, **kwargs)
    tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
    inputs_there = any(isinstance(tensor, Pretend) for tensor in tensors)
    named = kwargs.get("device")
    there = inputs_there if named is None else named == _STAND_IN
    if not inputs_there and not there:
        return func(*args, **kwargs)
    name = func._schema.name
    if name not in _COPIES:
        _check(func, name, args, tensors)
    if torch.Tag.inplace_view in func.tags:
        raise NotImplementedError(f"{name} changes a tensor's shape in place, which `Pretend` cannot follow.")
    if named is not None:
        kwargs = kwargs | {"device": torch.device("cpu") if there else named}
    if there and any(argument.name == "generator" for argument in func._schema.arguments):
        given = kwargs.get("generator")
        if given is not None:
            raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{given.device.type}'")
        kwargs = kwargs | {"generator": _generator}
    kwargs.pop("pin_memory", None) if there else None
    owners = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, Pretend)}

    def wrap(value: Any) -> Any:
        if id(value) in owners:
            return owners[id(value)]
        return Pretend(value) if isinstance(value, Tensor) else value

    if name == "aten::histc":  # of whole numbers as well on CUDA
        return Pretend(func(args[0].held.double(), *args[1:], **kwargs).to(args[0].dtype))
    found = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    return tree_map(wrap, found) if there or name in _COPIES else found


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Pretend) else value


def _check(func: Any, name: str, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    """Raises RuntimeError, as CUDA does, where an operation may not be done on these tensors."""
    if name in ABSENT:
        raise NotImplementedError(f"Could not run '{name}' with arguments from the 'CUDA' backend.")
    if name in _PRODUCTS and not (tensors[0].is_floating_point() or tensors[0].is_complex()):
        raise RuntimeError(f"\"{name.split('::')[1]}_cuda\" not implemented for '{tensors[0].dtype}'")
    elsewhere = [tensor for tensor in tensors if not isinstance(tensor, Pretend)]
    if not elsewhere or len(elsewhere) == len(tensors):
        return
    if name in _INDEXED:
        if not isinstance(args[0], Pretend):
            raise RuntimeError(
                f"indices should be either on cpu or on the same device as the indexed tensor ({args[0].device})"
            )
        elsewhere = [tensor for tensor in args[2:] if isinstance(tensor, Tensor) and not isinstance(tensor, Pretend)]
    numbers = torch.Tag.pointwise in func.tags or name in _INDEXED
    written = {i for i, argument in enumerate(func._schema.arguments) if argument.is_write}
    outputs = [args[i] for i in written if i < len(args)]
    for tensor in elsewhere:
        if not numbers or tensor.dim() or any(tensor is output for output in outputs):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and "
                f"{tensor.device}! ({func} of {[(list(each.shape), str(each.device)) for each in tensors]})"
            )


def _launch(run: Callable[..., Any]) -> Callable[..., Any]:
    """Triton's interpreter, given what a launch is given on a GPU: tensors of the device alone."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    def value_of(given: Any) -> Any:
        if isinstance(given, Pretend):
            return given.held
        if isinstance(given, TensorDescriptor):
            rest = (given.shape, given.strides, given.block_shape, given.padding, given.round_f32_to_tf32)
            return TensorDescriptor(value_of(given.base), *rest)
        if isinstance(given, Tensor):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        if isinstance(given, tuple):
            values = [value_of(each) for each in given]
            return type(given)(*values) if hasattr(given, "_fields") else tuple(values)
        return given

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(each, Pretend) for each in tree_iter((args, kwargs))):
            return run(self, *args, **kwargs)
        # What the interpreter computes with is on the CPU.
        with torch.utils._python_dispatch._disable_current_modes():
            return run(self, *map(value_of, args), **{name: value_of(value) for name, value in kwargs.items()})

    return launch


@contextmanager
def pretend_cuda(available: bool = False) -> Iterator[torch.device]:
    """A block in which tensors can be made on and moved to `cuda`, in this thread.

    Args:
        available: what `torch.cuda.is_available()` is to say.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.interpreter import GridExecutor

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    cuda = {
        "_lazy_init": nothing,
        "is_available": lambda: available,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "is_current_stream_capturing": lambda: False,
        "synchronize": nothing,
        "empty_cache": nothing,
        "get_device_name": lambda device=None: "a pretended GPU",
        "get_device_capability": lambda device=None: (9, 0),
        "reset_peak_memory_stats": nothing,
        "max_memory_allocated": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "get_rng_state": lambda device="cuda": _generator.get_state(),
        "set_rng_state": lambda state, device="cuda": _generator.set_state(state),
        "manual_seed_all": lambda seed: _generator.manual_seed(seed),
    }
    with ExitStack() as stack:
        for name, stand_in in cuda.items():
            stack.enter_context(patch.object(torch.cuda, name, stand_in))
        hopper = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
        stack.enter_context(patch.object(type(driver), "active", hopper))
        stack.enter_context(patch.object(GridExecutor, "__call__", _launch(GridExecutor.__call__)))
        # A module's weights are the same objects after a move, as on a GPU, so that shared ones stay shared.
        stack.enter_context(patch.object(torch.__future__, "get_swap_module_params_on_conversion", lambda: True))
        # `torch.tensor` would fill memory of the device itself otherwise.
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        stack.enter_context(_Operations())
        stack.enter_context(_Names())
        yield torch.device("cuda")

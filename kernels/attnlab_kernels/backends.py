"""Which backend takes a call."""

from __future__ import annotations

import importlib.util

from attnlab_kernels.emit import Emit
from attnlab_kernels.errors import UnsupportedError
from attnlab_kernels.problem import Problem
from attnlab_kernels.request import Request

BACKENDS = ("auto", "triton", "tiled", "dense")


def choose_backend(backend: str, problem: Problem, request: Request | None = None) -> str:
    """The one named, "triton", "tiled" or "dense"; for "auto" triton on a GPU where it can do the call, else tiled.

    Raises:
        ValueError: a name that is none of a backend.
        UnsupportedError: the backend named cannot do the call.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; expected one of {', '.join(BACKENDS)}.")
    if backend in ("tiled", "dense"):
        return backend
    if backend == "auto" and not problem.q.is_cuda:
        return "tiled"
    if not _has_triton():
        if backend == "auto":
            return "tiled"
        raise UnsupportedError("backend 'triton' needs the package triton, which is not installed.")
    from attnlab_kernels.gpu.backend import unsupported

    missing = unsupported(problem, Request(Emit()) if request is None else request)
    if missing is None:
        return "triton"
    if backend == "auto":
        return "tiled"
    raise UnsupportedError(f"backend 'triton' does not support {missing}; use backend='tiled'.")


def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # a blocked module
        return False

"""The device that these tests run on: a GPU, or a pretended one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from attnlab_kernels import operator, products
from attnlab_kernels.backends import choose_backend

from .pretend import pretend_cuda


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """`cuda`. Where it is pretended, the backend "auto" is `tiled`: the interpreter of triton takes seconds a call."""
    transformers.utils.logging.set_verbosity_error()
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return

    def choose(backend: str, *problem: Any) -> str:
        return choose_backend("tiled" if backend == "auto" else backend, *problem)

    monkeypatch.setattr(operator, "choose_backend", choose)
    monkeypatch.setattr(products, "choose_backend", choose)
    with pretend_cuda(available=True) as there:
        yield there

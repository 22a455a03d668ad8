"""The front of the `triton` backend: which launches a call takes, and what it cannot do."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from attnlab_kernels.emit import Emitted
from attnlab_kernels.errors import UnsupportedError
from attnlab_kernels.gpu.entries import run_entries
from attnlab_kernels.gpu.forward import forward_kernel
from attnlab_kernels.gpu.gram import run_head_gram
from attnlab_kernels.gpu.launch_forward import Rows, run_forward
from attnlab_kernels.gpu.launch_statistics import run_statistics
from attnlab_kernels.gpu.top_k import run_top_k
from attnlab_kernels.problem import Problem
from attnlab_kernels.request import Request


def triton_attention(problem: Problem, request: Request, keep_rows: bool) -> tuple[Tensor, Emitted, Rows | None]:
    """Output in q's dtype and statistics in float32, on a GPU or in triton's interpreter; each row's normaliser.

    Raises:
        UnsupportedError: an option, a statistic or a device that this backend does not have, by name.
    """
    missing = unsupported(problem, request)
    if missing is not None:
        raise UnsupportedError(f"backend 'triton' does not support {missing}; use backend='tiled'.")
    over_queries = request.key_statistics or request.query_probes is not None or request.pools or request.edges
    chosen = any(index is not None for index in (request.gather, request.rows, request.columns))
    later = [
        run
        for run, asked in (
            (run_statistics, over_queries),
            (run_entries, chosen),
            (run_top_k, request.emit.top_k is not None),
            (run_head_gram, request.emit.head_gram),
        )
        if asked
    ]
    out, found, rows = run_forward(problem, request, keep_rows=keep_rows or bool(later))
    emitted: dict[str, object] = dict(found)
    if rows is not None:
        for run in later:
            emitted |= run(problem, request, rows)
    return out, Emitted(**emitted), rows if keep_rows else None  # type: ignore[arg-type]


def unsupported(problem: Problem, request: Request) -> str | None:
    """What of this call the kernels cannot do, in words; None if they can all of it."""
    interpreted = not isinstance(forward_kernel, triton.JITFunction)
    if problem.q.dtype == torch.float64:
        return "float64"
    if not (problem.q.is_cuda or interpreted):
        return f"tensors on {problem.q.device.type}"
    return None

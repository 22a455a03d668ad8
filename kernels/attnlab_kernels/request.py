"""The statistics asked for, checked against the problem's shapes and brought into one form (`Emit` -> `Request`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnlab_kernels.emit import Emit
from attnlab_kernels.problem import Problem
from attnlab_kernels.resolve import check_device, check_whole, values_can_be_read


@dataclass(frozen=True, eq=False)
class Request:
    """`Emit` with its shapes checked. Key probes are columns of the problem, since gradients reach them.

    Attributes:
        emit: as given; read for the booleans and for whether one or several pools and edges were asked for.
        query_probes: [b or 1, h or 1, Nq, G].
        gather: [b, Nq, T], rows and columns: [b, R].
        pools: block sizes. edges: sorted bin edges, one tensor for each profile.
        several_pools, several_edges: whether the answer is a tuple, because the question was one.
        checked: whether the values of indices and edges were; while a graph is traced they have none.
    """

    emit: Emit
    query_probes: Tensor | None = None
    gather: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    pools: tuple[int, ...] = ()
    edges: tuple[Tensor, ...] = ()
    several_pools: bool = False
    several_edges: bool = False
    checked: bool = True

    @property
    def key_statistics(self) -> bool:
        """Whether any of key_sum, key_square and key_max is asked for."""
        return self.emit.key_sum or self.emit.key_square or self.emit.key_max


def resolve_request(emit: Emit, problem: Problem) -> tuple[Problem, Request]:
    """Check every statistic asked for; the key probes become columns of the problem.

    Raises:
        ValueError: a shape, an index or a size that does not fit the problem.
    """
    b, n_q, n_k = problem.batch, problem.queries, problem.keys
    chosen = {name: getattr(emit, name) for name in ("key_probes", "query_probes", "gather", "rows", "columns")}
    for name, tensor in chosen.items():
        check_device(name, tensor, problem.q)
    emit = replace(emit, top_k=check_whole("top_k", emit.top_k))
    if emit.top_k is not None and emit.top_k < 1:
        raise ValueError(f"top_k is {emit.top_k}; expected at least 1.")
    request = Request(
        emit=emit,
        query_probes=probe_columns("query_probes", emit.query_probes, problem, n_q, problem.query_mask),
        gather=_indices("gather", emit.gather, (b, n_q, None)),
        rows=_indices("rows", emit.rows, (b, None)),
        columns=_indices("columns", emit.columns, (b, None)),
        pools=_pools(emit.pool),
        edges=_edges(emit.offsets, problem.q.device),
        several_pools=isinstance(emit.pool, Sequence),
        several_edges=_is_several(emit.offsets),
        checked=values_can_be_read(problem.q),
    )
    if request.checked:
        check_indices(request, problem)
    columns = probe_columns("key_probes", emit.key_probes, problem, n_k, problem.key_mask)
    return replace(problem, key_probes=columns), request


def probe_columns(
    name: str, probes: Tensor | None, problem: Problem, length: int, exists: Tensor | None
) -> Tensor | None:
    """[N, G], [B, N, G] or [B, H, N, G] probes as [b or 1, h or 1, N, G] in the problem's precision.

    They are 0 where `exists` [B, N] is False, whatever padding holds.
    """
    if probes is None:
        return None
    shape = tuple(probes.shape)
    full = probes.reshape((1,) * (4 - probes.dim()) + shape) if probes.dim() == 2 else probes
    full = full.unsqueeze(1) if full.dim() == 3 else full
    fits = full.dim() == 4 and all(
        size in (1, wanted) for size, wanted in zip(full.shape[:2], (problem.batch, problem.heads), strict=True)
    )
    if not fits or full.shape[2] != length:
        raise ValueError(
            f"{name} has shape {list(shape)}; expected [{length}, G], [{problem.batch}, {length}, G] or "
            f"[{problem.batch}, {problem.heads}, {length}, G]."
        )
    full = full.to(problem.dtype)
    return full if exists is None else full.masked_fill(~exists[:, None, :, None], 0)


def check_indices(request: Request, problem: Problem) -> None:
    """Raises ValueError where the value of an index or of an edge does not fit."""
    n_q, n_k = problem.queries, problem.keys
    chosen = (("gather", request.gather, n_k), ("rows", request.rows, n_q), ("columns", request.columns, n_k))
    for name, index, limit in chosen:
        if index is not None and index.numel() and (int(index.min()) < -1 or int(index.max()) >= limit):
            raise ValueError(f"{name} holds an index outside -1 .. {limit - 1}.")
    for edges in request.edges:
        if not bool((edges[1:] > edges[:-1]).all()):
            raise ValueError("offsets has edges that do not increase; expected e_0 < e_1 < ... < e_n.")


def _indices(name: str, index: Tensor | None, shape: tuple[int, *tuple[int | None, ...]]) -> Tensor | None:
    if index is None:
        return None
    given = list(index.shape)
    if index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} has dtype {index.dtype}; expected int64 indices, -1 for none.")
    full = index.expand(shape[0], -1) if index.dim() == 1 and len(shape) == 2 else index
    if full.dim() != len(shape) or any(want not in (None, got) for got, want in zip(full.shape, shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {given}; expected [{wanted}].")
    return full.long()


def _pools(pool: int | Sequence[int] | None) -> tuple[int, ...]:
    given = () if pool is None else tuple(pool) if isinstance(pool, Sequence) else (pool,)
    sizes = tuple(check_whole("pool", size) for size in given)
    for size in sizes:
        if size < 1:
            raise ValueError(f"pool has a block of {size}; expected at least 1.")
    return sizes


def _edges(offsets: Sequence[int] | Tensor | tuple[object, ...] | None, device: torch.device) -> tuple[Tensor, ...]:
    if offsets is None:
        return ()
    profiles = []
    for given in offsets if _is_several(offsets) else (offsets,):
        edges = torch.as_tensor(given, device=device)
        if edges.dim() != 1 or edges.numel() < 2 or edges.is_floating_point():
            raise ValueError(
                f"offsets has edges of shape {list(edges.shape)}; expected at least two integers in a row."
            )
        profiles.append(edges.long())
    return tuple(profiles)


def _is_several(offsets: object) -> bool:
    return isinstance(offsets, tuple) and len(offsets) > 0 and isinstance(offsets[0], (Sequence, Tensor))

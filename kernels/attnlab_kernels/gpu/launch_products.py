"""Finds each row's normaliser, then launches the passes that a set of gradient products needs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnlab_kernels.dense import block_sums
from attnlab_kernels.gpu.architecture import architecture_of
from attnlab_kernels.gpu.arguments import kernel_inputs, padded, strided
from attnlab_kernels.gpu.configs import Launch, products_launch
from attnlab_kernels.gpu.launch_forward import Rows, find_rows
from attnlab_kernels.gpu.pools import Pool, make_pool, means
from attnlab_kernels.gpu.products import Vectors, left_kernel, right_kernel
from attnlab_kernels.gpu.removal import Removal, removal_kernel
from attnlab_kernels.gpu.schedule import make_schedules
from attnlab_kernels.problem import Problem
from attnlab_kernels.product_request import GradientProducts, ProductRequest

MAX_VECTORS = 32
"""Most columns of x in one pass: their float32 accumulator shares the registers with two tiles."""


def run_products(
    problem: Problem, grad_out: Tensor, request: ProductRequest, launch: Launch | None = None
) -> GradientProducts:
    """Everything asked for.

    Args:
        problem: whose pattern is read.
        grad_out: [B, Hq, Nq, Dv].
        request: what to compute.
        launch: tile sizes of the passes over keys, the table's by default; over queries the two change places.
    """
    if not (problem.batch and problem.heads and problem.queries and problem.keys):
        return _nothing(problem, request)
    passes = Passes(problem, grad_out, request.function == "loss_change", launch)
    right = None if request.right is None else passes.right(request.right)
    maps: dict[int, PooledMap] = {}
    waiting = [] if request.left is None else list(request.left.split(MAX_VECTORS, dim=-1))
    products: list[Tensor] = []
    for size in sorted(set(request.pools)):
        finer = max((other for other in maps if size % other == 0), default=None)
        if finer is not None:
            maps[size] = _coarser(maps[finer], size // finer)
            continue
        # Each map's pass carries some vectors along.
        pool = passes.make_pool(size)
        products += passes.left(waiting.pop(0) if waiting else None, pool)
        maps[size] = PooledMap(*means(pool, *passes.shape))
    for some in waiting:
        products += passes.left(some, None)
    found = [maps[size] for size in request.pools]
    left = torch.cat(products, dim=-1) if products else None
    return request.answer([one.means for one in found], [one.counts for one in found], right, left)


class PooledMap(NamedTuple):
    """Means of f over blocks and the numbers of their entries, [B, Hq, blocks, blocks]."""

    means: Tensor
    counts: Tensor


def _coarser(finer: PooledMap, factor: int) -> PooledMap:
    counts = block_sums(finer.counts, factor)
    return PooledMap(block_sums(finer.means * finer.counts, factor) / counts.clamp(min=1), counts)


def _nothing(problem: Problem, request: ProductRequest) -> GradientProducts:
    """Zeros, where there are no entries at all."""
    n_q, n_k = problem.queries, problem.keys

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(problem.batch, problem.heads, *shape, device=problem.q.device)

    maps = [zeros(-(-n_q // size), -(-n_k // size)) for size in request.pools]
    right = None if request.right is None else zeros(n_q, request.right.shape[-1])
    left = None if request.left is None else zeros(n_k, request.left.shape[-1])
    return request.answer(maps, [torch.zeros_like(one) for one in maps], right, left)


class Passes:
    """The launches and their common arguments; the rows' numbers are found first."""

    def __init__(self, problem: Problem, grad_out: Tensor, loss_change: bool, launch: Launch | None) -> None:
        q, dv = problem.q, problem.v.shape[-1]
        self.problem = problem
        self.shape = problem.batch, problem.heads, problem.queries, problem.keys
        if launch is None:
            launch = products_launch(architecture_of(q), q.shape[-1], dv, q.element_size())
        self.over_keys = launch
        self.over_queries = launch._replace(block_m=launch.block_n, block_n=launch.block_m)
        self.x = kernel_inputs(problem)
        self.grad_out = strided(grad_out, *grad_out.shape)
        self.key_lists = make_schedules(problem, launch.block_m, launch.block_n).over_keys
        self.removal: Removal | None = None
        self.rows = self._remove() if loss_change else find_rows(problem)

    def _remove(self) -> Rows:
        problem, device, shape = self.problem, self.problem.q.device, self.shape[:3]
        pivot, log_z, total, others = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(4))
        self.removal = Removal(total, torch.empty(shape, dtype=torch.int32, device=device), others)
        removal_kernel[self._grid(problem.queries, self.over_keys.block_m)](
            self.x, self.grad_out, self.key_lists, pivot, log_z, self.removal, **self._tiles(self.over_keys)
        )
        return Rows(pivot, log_z)

    def right(self, x: Tensor) -> Tensor:
        """f x, [B, Hq, Nq, G]."""
        problem, launch = self.problem, self.over_keys
        products = []
        for some in x.split(MAX_VECTORS, dim=-1):
            vectors = self._vectors(some, problem.keys, problem.queries)
            products.append(vectors.products)
            if some.shape[-1]:
                right_kernel[self._grid(problem.queries, launch.block_m)](
                    self.x, self.grad_out, self.key_lists, self.rows, self.removal, vectors,
                    **self._tiles(launch), **_columns(some),
                )  # fmt: skip
        return torch.cat(products, dim=-1)

    def make_pool(self, size: int) -> Pool:
        """Memory for the block sums of one pass over queries."""
        return make_pool(size, *self.shape, self.over_queries, self.problem.q.device)

    def left(self, x: Tensor | None, pool: Pool | None) -> list[Tensor]:
        """x^T f [B, Hq, Nk, G] for at most `MAX_VECTORS` columns, none without x; fills the pool."""
        problem, launch = self.problem, self.over_queries
        vectors = None if x is None else self._vectors(x, problem.queries, problem.keys)
        some = None if x is None or not x.shape[-1] else vectors
        if some is not None or pool is not None:
            lists = make_schedules(problem, launch.block_m, launch.block_n).over_queries
            left_kernel[self._grid(problem.keys, launch.block_n)](
                self.x, self.grad_out, lists, self.rows, self.removal, some, pool,
                **self._tiles(launch), **_columns(x),
            )  # fmt: skip
        return [] if vectors is None else [vectors.products]

    def _vectors(self, x: Tensor, length: int, rows: int) -> Vectors:
        b, h, g = self.problem.batch, self.problem.heads, x.shape[-1]
        products = torch.empty(b, h, rows, g, dtype=torch.float32, device=x.device)
        return Vectors(strided(x, b, h, length, g), tl.constexpr(g), products)

    def _grid(self, length: int, block: int) -> tuple[int, int]:
        return self.problem.batch * self.problem.heads, triton.cdiv(length, block)

    def _tiles(self, launch: Launch) -> dict[str, int]:
        return {
            "BLOCK_M": launch.block_m,
            "BLOCK_N": launch.block_n,
            "BLOCK_D": padded(self.problem.q.shape[-1]),
            "BLOCK_DV": padded(self.problem.v.shape[-1]),
            **launch.options(),
        }


def _columns(x: Tensor | None) -> dict[str, Any]:
    """How many columns a pass multiplies with, and how their products keep float32's digits."""
    return {"BLOCK_G": padded(0 if x is None else x.shape[-1]), "PRECISION": "ieee" if torch.version.hip else "tf32x3"}

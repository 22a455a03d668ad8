"""Single entries of the pattern, without a pass: chosen rows, chosen columns, and keys gathered for each row.

A rectangle of chosen or successive queries and keys takes one product a tile. Of gathered keys a tile of rows takes
one place of their lists at a time: the products that belong together stand on the diagonal of a small tile. The matrix
unit computes them because it did so in the forward: an entry near 1 keeps its digits only if its product is rounded as
it was in the row's sum.
"""

# triton's own decorators and scalars carry no types
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnlab_kernels.gpu.arguments import Inputs, kernel_inputs, padded
from attnlab_kernels.gpu.configs import Launch, gathered_launch, rectangle_launch
from attnlab_kernels.gpu.launch_forward import Rows
from attnlab_kernels.gpu.scores import head_of, load_rows, logits, weights
from attnlab_kernels.problem import Problem
from attnlab_kernels.request import Request


class Rectangle(NamedTuple):
    """Which queries and keys: lists [b, number] with -1 for none, or where a list is None those from `first` on."""

    queries: Any
    keys: Any
    first_query: Any
    first_key: Any
    n_queries: Any
    n_keys: Any


@triton.jit
def _numbers(chosen, first, size, limit, i_b, o):
    """The queries or keys at places `o`; `limit`, which is out of sight, where there is none."""
    found = first + o
    if chosen is not None:
        found = tl.load(chosen + i_b * size + o, mask=o < size, other=-1).to(tl.int32)
        found = tl.where(found < 0, limit, found)
    return found


@triton.jit
def rectangle_kernel(
    x, rows, rectangle, out, batch_heads,
    COUNTED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: one tile of `out` [B, Hq, n_queries, n_keys]. Grid (B * Hq * tiles).

    With `COUNTED` the rows of queries that do not count are 0.
    """
    i_bh = (tl.program_id(0) % batch_heads).to(tl.int64)
    i_tile = tl.program_id(0) // batch_heads
    key_tiles = tl.cdiv(rectangle.n_keys, BLOCK_N)
    i_b = i_bh // x.heads
    i_h = i_bh % x.heads
    o_r = i_tile // key_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = i_tile % key_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = _numbers(rectangle.queries, rectangle.first_query, rectangle.n_queries, x.queries, i_b, o_r)
    o_n = _numbers(rectangle.keys, rectangle.first_key, rectangle.n_keys, x.keys, i_b, o_c)
    if COUNTED and x.query_mask is not None:
        counts = tl.load(x.query_mask + i_b * x.queries + o_m, mask=o_m < x.queries, other=0)
        o_m = tl.where(counts != 0, o_m, x.queries)
    in_rows = o_m < x.queries
    o_d = tl.arange(0, BLOCK_D)
    at = head_of(x.q, i_b, i_h) + o_m[:, None].to(tl.int64) * x.q.n + o_d[None, :] * x.q.d
    b_q = tl.load(at, mask=in_rows[:, None] & (o_d[None, :] < x.d), other=0.0)
    at = head_of(x.k, i_b, i_h // x.group) + o_n[None, :].to(tl.int64) * x.k.n + o_d[:, None] * x.k.d
    b_k = tl.load(at, mask=(o_n[None, :] < x.keys) & (o_d[:, None] < x.d), other=0.0)
    b_s = tl.dot(b_q, b_k, input_precision="ieee")
    b_s, _, _ = logits(b_s, x, i_b, i_h, o_m[:, None], o_n[None, :], True)
    o_row = i_bh * x.queries + o_m
    pivot = tl.load(rows.pivot + o_row, mask=in_rows, other=float("inf"))
    log_z = tl.load(rows.log_z + o_row, mask=in_rows, other=0.0)
    b_a = weights(b_s, x, pivot[:, None], log_z[:, None])
    at = out + (i_bh * rectangle.n_queries + o_r[:, None]) * rectangle.n_keys + o_c[None, :]
    tl.store(at, b_a, mask=(o_r[:, None] < rectangle.n_queries) & (o_c[None, :] < rectangle.n_keys))


@triton.jit
def gathered_kernel(
    x, rows, listed, length, out, batch_heads,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: one tile of `out` [B, Hq, Nq, length], keys from `listed` [B, Nq, length]. Grid (B * Hq * tiles)."""
    i_bh = (tl.program_id(0) % batch_heads).to(tl.int64)
    i_tile = tl.program_id(0) // batch_heads
    place_tiles = tl.cdiv(length, BLOCK_T)
    i_b = i_bh // x.heads
    i_h = i_bh % x.heads
    i_m = i_tile // place_tiles
    first = i_tile % place_tiles * BLOCK_T
    o = tl.arange(0, BLOCK_M)
    o_m = i_m * BLOCK_M + o
    o_t = tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    in_rows = o_m < x.queries
    o_row = i_bh * x.queries + o_m
    p_k = head_of(x.k, i_b, i_h // x.group)
    p_listed = listed + (i_b * x.queries + o_m) * length + first
    b_q = load_rows(head_of(x.q, i_b, i_h), x.q, i_m * BLOCK_M, x.queries, x.d, BLOCK_M, BLOCK_D, True)
    pivot = tl.load(rows.pivot + o_row, mask=in_rows, other=float("inf"))
    log_z = tl.load(rows.log_z + o_row, mask=in_rows, other=0.0)
    b_a = tl.zeros([BLOCK_M, BLOCK_T], tl.float32)
    for t in range(tl.minimum(BLOCK_T, length - first)):
        o_n = tl.load(p_listed + t, mask=in_rows, other=-1).to(tl.int32)
        o_n = tl.where(o_n < 0, x.keys, o_n)
        at = p_k + o_n[None, :].to(tl.int64) * x.k.n + o_d[:, None] * x.k.d
        b_k = tl.load(at, mask=(o_n[None, :] < x.keys) & (o_d[:, None] < x.d), other=0.0)
        b_s = tl.dot(b_q, b_k, input_precision="ieee")
        b_s = tl.sum(tl.where(o[:, None] == o[None, :], b_s, 0.0), 1)
        b_s, _, _ = logits(b_s, x, i_b, i_h, o_m, o_n, True)
        b_a = tl.where(o_t[None, :] == t, weights(b_s, x, pivot, log_z)[:, None], b_a)
    at = out + o_row[:, None] * length + first + o_t[None, :]
    tl.store(at, b_a, mask=in_rows[:, None] & (first + o_t[None, :] < length))


def run_entries(problem: Problem, request: Request, rows: Rows) -> dict[str, Tensor]:
    """Chosen rows [B, Hq, R, Nk], chosen columns [B, Hq, Nq, R] and gathered entries [B, Hq, Nq, T] of A."""
    b, h, n_q, n_k = problem.batch, problem.heads, problem.queries, problem.keys
    x = kernel_inputs(problem)
    found: dict[str, Tensor] = {}

    def empty(*shape: int) -> Tensor:
        return torch.empty(b, h, *shape, dtype=torch.float32, device=problem.q.device)

    if request.gather is not None:
        found["gathered"] = empty(n_q, request.gather.shape[-1])
        _launch_gathered(x, rows, request.gather.contiguous(), found["gathered"])
    if request.rows is not None:
        number = request.rows.shape[-1]
        found["rows"] = empty(number, n_k)
        launch_rectangle(x, rows, Rectangle(request.rows.contiguous(), None, 0, 0, number, n_k), found["rows"])
    if request.columns is not None:
        number = request.columns.shape[-1]
        found["columns"] = empty(n_q, number)
        launch_rectangle(x, rows, Rectangle(None, request.columns.contiguous(), 0, 0, n_q, number), found["columns"])
    return found


def launch_rectangle(
    x: Inputs, rows: Rows, rectangle: Rectangle, out: Tensor, counted: bool = False, launch: Launch | None = None
) -> None:
    """Write the entries of a rectangle into a contiguous [B, Hq, n_queries, n_keys] float32 tensor.

    Args:
        x: the problem.
        rows: the rows' normalisers.
        rectangle: which queries and keys.
        out: where to write.
        counted: whether rows of queries that do not count are 0.
        launch: tile sizes; the table's by default.
    """
    b, h, n_queries, n_keys = out.shape
    if not out.numel():
        return
    if launch is None:
        launch = rectangle_launch(n_queries, n_keys, x.d.value, x.q.p.element_size())
    tiles = triton.cdiv(n_queries, launch.block_m) * triton.cdiv(n_keys, launch.block_n)
    rectangle_kernel[(b * h * tiles,)](
        x, rows, rectangle, out, b * h,
        COUNTED=counted, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_D=padded(x.d.value),
        **launch.options(),
    )  # fmt: skip


def _launch_gathered(x: Inputs, rows: Rows, listed: Tensor, out: Tensor) -> None:
    b, h, n_q, length = out.shape
    if not out.numel():
        return
    launch = gathered_launch(length)
    tiles = triton.cdiv(n_q, launch.block_m) * triton.cdiv(length, launch.block_n)
    gathered_kernel[(b * h * tiles,)](
        x, rows, listed, length, out, b * h,
        BLOCK_M=launch.block_m, BLOCK_T=launch.block_n, BLOCK_D=padded(x.d.value),
        **launch.options(),
    )  # fmt: skip

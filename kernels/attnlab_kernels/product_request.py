"""What `gradient_products` is asked for, checked against the problem's shapes, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from attnlab_kernels.emit import Emit
from attnlab_kernels.problem import Problem
from attnlab_kernels.request import probe_columns, resolve_request
from attnlab_kernels.resolve import check_device

Function = Literal["relevance", "loss_change"]


@dataclass(frozen=True, eq=False)
class GradientProducts:
    """The products computed, None where not asked; float32, or float64 from float64 inputs. f is [B, Hq, Nq, Nk].

    Attributes:
        pooled: [B, Hq, ceil(Nq / b), ceil(Nk / b)], mean of f over a block's entries that are visible to queries that
            count, 0 without any; a tuple of maps when several were asked for.
        pooled_count: the number of those entries.
        right: [B, Hq, Nq, G], f x for x over keys; rows that `query_mask` leaves out have theirs too.
        left: [B, Hq, Nk, G], x^T f for x over queries, of which those that `query_mask` leaves out add nothing.
    """

    pooled: Tensor | tuple[Tensor, ...] | None = None
    pooled_count: Tensor | tuple[Tensor, ...] | None = None
    right: Tensor | None = None
    left: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ProductRequest:
    """What to compute, in one form.

    Attributes:
        function: which f.
        pools: block sizes. several_pools: whether the answer is a tuple, because the question was one.
        right, left: [b or 1, h or 1, Nk, G] and [b or 1, h or 1, Nq, G], 0 where a mask leaves the position out.
    """

    function: Function
    pools: tuple[int, ...]
    several_pools: bool
    right: Tensor | None
    left: Tensor | None

    def answer(
        self, means: Sequence[Tensor], counts: Sequence[Tensor], right: Tensor | None, left: Tensor | None
    ) -> GradientProducts:
        """The maps, one or several as was asked, and the products."""
        if not self.pools:
            return GradientProducts(right=right, left=left)
        if not self.several_pools:
            return GradientProducts(means[0], counts[0], right, left)
        return GradientProducts(tuple(means), tuple(counts), right, left)


def resolve_products(
    problem: Problem,
    grad_out: Tensor,
    function: str,
    pool: int | Sequence[int] | None,
    right: Tensor | None,
    left: Tensor | None,
) -> ProductRequest:
    """Check the gradient and everything asked for.

    Raises:
        ValueError: what was given and what was expected.
    """
    shape = (problem.batch, problem.heads, problem.queries, problem.v.shape[-1])
    if tuple(grad_out.shape) != shape:
        raise ValueError(
            f"grad_out has shape {list(grad_out.shape)}; expected {list(shape)}, the shape of attention's output."
        )
    if grad_out.dtype != problem.q.dtype:
        raise ValueError(f"grad_out has dtype {grad_out.dtype}; expected {problem.q.dtype}, as q.")
    chosen = next((name for name in get_args(Function) if name == function), None)
    if chosen is None:
        raise ValueError(f"function is {function!r}; expected one of {', '.join(get_args(Function))}.")
    if chosen == "loss_change" and problem.normalizer == "sigmoid":
        raise ValueError("function='loss_change' renormalises a row, which normalizer='sigmoid' never does.")
    if pool is None and right is None and left is None:
        raise ValueError("gradient_products was asked for nothing; expected pool, right or left.")
    for name, tensor in (("grad_out", grad_out), ("right", right), ("left", left)):
        check_device(name, tensor, problem.q)
    _, pools = resolve_request(Emit(pool=pool), problem)
    return ProductRequest(
        function=chosen,
        pools=pools.pools,
        several_pools=pools.several_pools,
        right=probe_columns("right", right, problem, problem.keys, problem.key_mask),
        left=probe_columns("left", left, problem, problem.queries, problem.query_mask),
    )

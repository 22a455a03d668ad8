"""Edits of what the softmax is taken of: its temperature, and the keys that a streaming head keeps."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnlab.capture.arguments import Arguments
from attnlab.capture.call import Site
from attnlab.capture.intervention import PatternEdit, Plain, Solver, Variant, per_head
from attnlab.errors import AttnlabError


@dataclass(frozen=True, eq=False)
class Temperature(PatternEdit):
    """Softmax of the logits divided by T: sharper below 1, flatter above.

    All logits are divided, with their biases and a learned sink's; a soft cap is applied before.

    Attributes:
        value: T, one number or a table [layers, heads]; a tensor may require gradients.

    Raises:
        ValueError: T is not positive.

    Example:
        >>> Temperature("L5H1", 2.0).value
        2.0
    """

    value: float | Tensor

    stage = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not bool((torch.as_tensor(self.value) > 0).all()):
            raise ValueError(f"The temperature of {self.describe()} is {self.value}; expected a positive number.")

    def splits_by(self, problem: Arguments, layer: int, head: int) -> Hashable:
        """The temperature, where a soft cap allows but one in a call."""
        table = isinstance(self.value, Tensor) and self.value.dim() == 2
        if problem.softcap is None or not table or not isinstance(self.value, Tensor):
            return None
        return float(self.value[layer, head])

    def edit(self, solver: Solver, site: Site, heads: tuple[int, ...], backend: str) -> Iterable[Variant]:
        """The problem with its logits divided."""
        problem = self.plain(solver)
        t = per_head("temperature", self.value, site, heads, problem.q)
        learned = t.requires_grad and torch.is_grad_enabled()
        if problem.softcap is not None and learned:
            raise AttnlabError(
                f"{self.describe()} has a temperature that requires gradients, which do not pass the soft cap of layer "
                f"{site.layer}; give a number."
            )
        if problem.bias is not None:
            uniform = not learned and bool((t == t[0]).all())
            problem = replace(problem, bias=problem.bias / (t[0] if uniform else t[:, None, None]))
        if problem.sinks is not None:
            problem = replace(problem, sinks=problem.sinks / t)
        if learned or bool((t != t[0]).any()):
            problem = in_full_precision(problem)
            problem = replace(problem, q=problem.q / t[:, None, None])
        else:
            number = float(t[0])
            cap = None if problem.softcap is None else problem.softcap / number
            problem = replace(problem, scale=problem.scale / number, softcap=cap)
        return [Variant(self.queries(site), Plain(problem))]


@dataclass(frozen=True, eq=False)
class Streaming(PatternEdit):
    """Keep only the first keys and a window of recent ones, as a streaming head does (StreamingLLM, arXiv 2309.17453).

    What the model hides stays hidden. In a batch padded on the left the first keys of each row are its first tokens.

    Attributes:
        first_tokens: how many of the first keys stay visible.
        window: keys at a distance below it stay visible; the query itself is at distance 0.

    Raises:
        ValueError: a negative number of first tokens, or a window below 1.
        AttnlabError: in cross-attention, where keys are at no distance.

    Example:
        >>> Streaming("L5", first_tokens=4, window=256).window
        256
    """

    first_tokens: int
    window: int

    stage = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first_tokens < 0 or self.window < 1:
            raise ValueError(
                f"{self.describe()} has first_tokens {self.first_tokens} and window {self.window}; expected at least 0 "
                "and 1."
            )
        if self.kind == "cross":
            raise AttnlabError(
                f"{self.describe()} is about cross-attention, where keys are at no distance from queries."
            )

    def edit(self, solver: Solver, site: Site, heads: tuple[int, ...], backend: str) -> Iterable[Variant]:
        """The problem with the window, once for each number of padding keys on the left."""
        problem, rows = self.plain(solver), self.queries(site)
        if problem.window is not None and problem.window <= self.window:
            return [Variant(rows, solver)]
        exists = site.key_mask
        if exists is None or self.first_tokens == 0:
            return [Variant(rows, Plain(self._cut(problem, self.first_tokens)))]
        first = exists.int().argmax(1)
        return [
            Variant(
                (first == n)[:, None] if rows is None else (first == n)[:, None] & rows,
                Plain(self._cut(problem, int(n) + self.first_tokens)),
            )
            for n in first.unique()
        ]

    def _cut(self, problem: Arguments, first_tokens: int) -> Arguments:
        if problem.window is not None and first_tokens and problem.q.shape[2] + problem.query_offset > problem.window:
            problem = replace(problem, mask=_within(problem, problem.window))
        return replace(problem, window=self.window, first_tokens=first_tokens)


def _within(problem: Arguments, window: int) -> Tensor:
    """[1, 1, Nq, Nk] booleans of the model's own window, which the first tokens must not be seen beyond."""
    device = problem.q.device
    i = torch.arange(problem.q.shape[2], device=device) + problem.query_offset
    near = ((i[:, None] - torch.arange(problem.k.shape[2], device=device)).abs() < window)[None, None]
    return near if problem.mask is None else problem.mask & near


def in_full_precision(problem: Arguments) -> Arguments:
    """The problem with q, k and v in at least float32, in which it is computed anyway."""
    dtype = torch.promote_types(problem.q.dtype, torch.float32)
    return replace(problem, q=problem.q.to(dtype), k=problem.k.to(dtype), v=problem.v.to(dtype))

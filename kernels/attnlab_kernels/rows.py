"""Whole rows of a tile: scores, masks, softmax and row statistics in reused buffers (backend `tiled`).

Each row is centred on its largest logit m before anything is summed, so with t = s - m
entropy = ln Z - sum(e^t t) / Z keeps its digits whatever the size of the logits; see also arXiv 2205.14135.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnlab_kernels.problem import Problem

KEPT_MASKS = 4


class Workspace:
    """Buffers that every tile reuses."""

    def __init__(self, problem: Problem) -> None:
        self._dtype, self._device = problem.dtype, problem.q.device
        self._buffers: dict[str, Tensor] = {}
        self._masks: dict[tuple[int, ...], Tensor | None] = {}

    def hidden(self, block: Problem, part: slice) -> Tensor | None:
        """What a range of a block's keys hides, [b or 1, h or 1, i, j]; None for nothing.

        Where only distances matter, as on a causal diagonal, blocks share the mask, so the last few are kept.
        """
        everything = slice(0, block.batch), slice(0, block.key_heads), slice(0, block.queries)
        piece = block.cut(*everything, part)
        by_distance = not has_content_masks(block) and block.prefix is None and block.first_tokens <= 0
        key = (piece.offset, piece.queries, piece.keys)
        if by_distance and key in self._masks:
            return self._masks[key]
        visible = piece.visible()
        hidden = None if visible is None else ~visible
        if by_distance:
            if len(self._masks) >= KEPT_MASKS:
                self._masks.clear()
            self._masks[key] = hidden
        return hidden

    def take(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor of this shape; a later call with this name may reuse its memory."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=self._dtype, device=self._device)
            self._buffers[name] = buffer
        return buffer[:size].view(shape)


@dataclass(frozen=True, eq=False)
class Rows:
    """A tile's rows.

    Attributes:
        near_shares: [b, h, i, j], A over its row sum but for a factor a row; 0 where hidden. A buffer.
        to_weights, to_shares: [b, h, i, 1]; near_shares times these are A, and A over its row sum, a sink counted in.
        lse, max_share: [b, h, i]; max_share is the largest share of a key.
        entropy, argmax: [b, h, i]; None where not asked for. argmax counts from the tile's first key, -1 for none.
    """

    near_shares: Tensor
    to_weights: Tensor
    to_shares: Tensor
    lse: Tensor
    max_share: Tensor
    entropy: Tensor | None
    argmax: Tensor | None


def softmax_rows(block: Problem, work: Workspace, entropy: bool, argmax: bool) -> Rows:
    """Scores of a block of queries with all the keys they see, and what each row's sums give."""
    b, h, n_q, n_k = block.batch, block.heads, block.queries, block.keys
    s = block.logits_into(work.take("scores", b, h, n_q, n_k))
    parts = list(_hidden_parts(block, work))
    for at, hidden in parts:
        s[..., at].masked_fill_(hidden, -math.inf)
    best: Tensor | None = None
    if n_k == 0:
        top = s.new_full((b, h, n_q, 1), -math.inf)
    elif argmax:
        top, best = s.max(-1, keepdim=True)
        best = torch.where(top == -math.inf, -1, best).squeeze(-1)
    else:
        top = s.amax(-1, keepdim=True)
    if argmax and best is None:
        best = torch.full((b, h, n_q), -1, device=s.device)
    p = work.take("shares", b, h, n_q, n_k)
    torch.softmax(s, -1, out=p)
    empty = top == -math.inf
    if parts and bool(empty.any()):
        p.masked_fill_(empty, 0)
    largest = p.amax(-1, keepdim=True) if n_k else torch.zeros_like(top)
    # Summed again: torch's fused softmax leaves sums that are off by several roundings.
    total = torch.where(empty, 1, p.sum(-1, keepdim=True))
    largest = torch.where(empty, 1, largest) / total
    log_total = -torch.log(largest)
    own_entropy: Tensor | None = None
    if entropy:
        s.sub_(torch.where(empty, 0, top))
        for at, hidden in parts:
            s[..., at].masked_fill_(hidden, 0)
        own_entropy = log_total - s.mul_(p).sum(-1, keepdim=True) / total
    lse, share = top + log_total, torch.ones_like(top)
    if block.sinks is not None:
        lse, share, own_entropy = _with_sink(block.sinks.to(block.dtype)[:, None, None], top, log_total, own_entropy)
    to_shares = torch.where(empty, 0, share / total)
    return Rows(
        near_shares=p,
        to_weights=torch.exp(top) / (largest * total) if block.normalizer == "sigmoid" else to_shares,
        to_shares=to_shares,
        lse=lse.squeeze(-1),
        max_share=torch.where(empty, 0, largest * share).squeeze(-1),
        entropy=None if own_entropy is None else torch.where(empty, 0, own_entropy).squeeze(-1),
        argmax=best,
    )


def _with_sink(
    sink: Tensor, top: Tensor, log_total: Tensor, entropy: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Lse and entropy with one more logit, and the share that is left to the keys.

    The entropy follows by grouping: that of the choice between keys and sink, plus the keys' own times their share.
    """
    pivot = torch.maximum(top, sink)
    pivot = torch.where(pivot == -math.inf, 0, pivot)
    keys, other = top - pivot + log_total, sink - pivot
    log_sum = torch.log(torch.exp(keys) + torch.exp(other))
    share = torch.exp(keys - log_sum)
    if entropy is not None:
        entropy = share * entropy + torch.special.entr(share) + torch.special.entr(torch.exp(other - log_sum))
    return pivot + log_sum, share, entropy


def _hidden_parts(block: Problem, work: Workspace) -> Iterator[tuple[slice, Tensor]]:
    """Ranges of keys in which a tile hides entries, with what is hidden. Between them every entry is visible."""
    n_k = block.keys
    left, right = 0, n_k
    if has_content_masks(block) or block.prefix is not None or block.first_tokens > 0:
        left = n_k
    else:
        if block.causal:
            right = min(right, max(0, block.offset + 1))
        if block.window is not None:
            left = min(n_k, max(0, block.queries + block.offset - block.window))
            right = min(right, max(0, block.offset + block.window))
    parts = [slice(0, n_k)] if left >= right else [slice(0, left), slice(right, n_k)]
    for part in parts:
        hidden = work.hidden(block, part) if part.stop > part.start else None
        if hidden is not None:
            yield part, hidden


def has_content_masks(block: Problem) -> bool:
    """Whether anything but position hides entries."""
    masks = (block.query_segments, block.key_mask, block.mask, block.bias)
    return any(mask is not None for mask in masks)


def in_compute_precision(problem: Problem) -> Problem:
    """The problem with keys, values laid out for batched products; a copy only where the caller's layout is another."""
    k, v = (tensor.to(problem.dtype).contiguous() for tensor in (problem.k, problem.v))
    return replace(problem, k=k, v=v)

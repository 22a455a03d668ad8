"""z that was recorded elsewhere: the calls of another capture, or tensors of one's own; what is patched in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from attnlab.capture.call import Call, Head, Kind, Site
from attnlab.capture.session import Session
from attnlab.capture.where import first_position, read_heads
from attnlab.errors import AttnlabError

Source: TypeAlias = Session | Sequence[Call] | Mapping[Any, Tensor]
"""A capture with `qkv=True` or its calls; or tensors by layer, (kind, layer), `Head` or `"L5H1"`.

A layer's tensor is [Hq, Dv], [Hq, N, Dv] or [B, Hq, N, Dv], a head's [Dv], [N, Dv] or [B, N, Dv], from position 0.
"""


class _Piece(NamedTuple):
    """z [B or 1, heads, N, Dv] of positions start ... start + N - 1; of every position where start is None."""

    start: int | None
    z: Tensor


class Recorded:
    """z by kind, layer and head.

    Args:
        source: see `Source`.
        kind: of the layers that are given as numbers.
        name: what a message calls the intervention.

    Raises:
        AttnlabError: a call has no z, or two runs are mixed.
        ValueError: a key or a shape that is not known.
    """

    def __init__(self, source: Source, kind: Kind, name: str) -> None:
        self.name = name
        self._layers: dict[tuple[str, int], list[_Piece]] = {}
        self._heads: dict[Head, _Piece] = {}
        self._kind = kind
        if isinstance(source, Mapping):
            for key, z in source.items():
                self._add_tensor(key, z)
        else:
            for call in source.calls if isinstance(source, Session) else source:
                self._add_call(call)
            for (_, layer), pieces in self._layers.items():
                self._check_order(layer, pieces)
        if not self._layers and not self._heads:
            raise AttnlabError(f"{name} got no recorded z; capture with qkv=True and without on_call.")

    def _add_call(self, call: Call) -> None:
        if call.z is None:
            raise AttnlabError(f"{self.name} needs calls that kept z; capture with qkv=True.")
        pieces = self._layers.setdefault((call.kind, call.layer), [])
        start = first_position(call.site)
        if call.kind == "cross" and pieces:
            start = (pieces[-1].start or 0) + pieces[-1].z.shape[2]
        pieces.append(_Piece(start, call.z))

    def _check_order(self, layer: int, pieces: list[_Piece]) -> None:
        end = pieces[0].start or 0
        for start, z in pieces:
            if start != end or z.shape[0] != pieces[0].z.shape[0]:
                raise AttnlabError(
                    f"{self.name} got calls of layer {layer} that do not follow each other, so of several runs; give "
                    "those of one run."
                )
            end += z.shape[2]

    def _add_tensor(self, key: Any, z: Tensor) -> None:
        if isinstance(key, (str, Head)):
            named = read_heads(key) or {}
            for layer, heads in named.items():
                if heads is not None:
                    self._heads[Head(layer, heads[0])] = _piece(key, z.unsqueeze(-2 if z.dim() < 2 else -3), z.dim())
                else:
                    self._layers[self._kind, layer] = [_piece(key, z, z.dim() - 1)]
            if not named:
                raise ValueError(f"{self.name} got z of {key!r}; expected a layer, (kind, layer), a Head or 'L5H1'.")
            return
        where = (self._kind, key) if isinstance(key, int) else key
        if not (isinstance(where, tuple) and len(where) == 2 and isinstance(where[1], int)):
            raise ValueError(f"{self.name} got z of {key!r}; expected a layer, (kind, layer), a Head or 'L5H1'.")
        self._layers[where[0], where[1]] = [_piece(key, z, z.dim() - 1)]

    def at(self, site: Site, heads: tuple[int, ...], rows: Tensor | None, like: Tensor) -> Tensor:
        """[B, h, Nq, Dv], the recorded z at a call's positions.

        Args:
            site: of the call.
            heads: whose z.
            rows: [1 or B, Nq], the queries whose z is used; others may lack one.
            like: the call's own z of these heads.

        Raises:
            AttnlabError: something is not recorded, or its shape does not fit.
        """
        pieces = self._layers.get((site.kind, site.layer))
        if pieces is not None:
            z, there = self._spread(pieces, site, like)
            if z.shape[1] != site.n_heads:
                raise AttnlabError(f"{self.name} got z of {z.shape[1]} heads for layer {site.layer}'s {site.n_heads}.")
            z = z[:, list(heads)]
        else:
            found = []
            for head in heads:
                piece = self._heads.get(Head(site.layer, head))
                if piece is None:
                    raise AttnlabError(f"{self.name} got no z of {site.kind} {Head(site.layer, head)}.")
                found.append(self._spread([piece], site, like))
            z = torch.cat(torch.broadcast_tensors(*(z for z, _ in found)), 1)
            there = torch.stack([there for _, there in found]).all(0)
        needed = ~there[None] if rows is None else rows & ~there
        if bool(needed.any()):
            position = int(needed.any(0).int().argmax()) + first_position(site)
            raise AttnlabError(
                f"{self.name} got no z of position {position} of {site.kind} layer {site.layer}; choose positions that "
                "were recorded, or record a prompt of the same length."
            )
        if z.shape[0] not in (1, site.batch) or z.shape[-1] != like.shape[-1]:
            raise AttnlabError(
                f"{self.name} got z of {z.shape[0]} batch rows and {z.shape[-1]} columns for {site.kind} layer "
                f"{site.layer}, which has {site.batch} and {like.shape[-1]}."
            )
        return z.expand_as(like)

    def _spread(self, pieces: list[_Piece], site: Site, like: Tensor) -> tuple[Tensor, Tensor]:
        """The z of a call's queries [B or 1, heads, Nq, Dv], 0 where none is recorded, and where it is [Nq]."""
        z = torch.cat([piece.z for piece in pieces], 2).to(like.device, like.dtype)
        start = pieces[0].start
        if start is None:
            everywhere = torch.ones(site.n_queries, dtype=torch.bool, device=like.device)
            return z.expand(-1, -1, site.n_queries, -1), everywhere
        index = torch.arange(site.n_queries, device=like.device) + first_position(site) - start
        there = (index >= 0) & (index < z.shape[2])
        if bool(there.all()) and z.shape[2] == site.n_queries:
            return z, there
        taken = z.index_select(2, index.clamp(0, z.shape[2] - 1))
        return taken * there[:, None].to(z.dtype), there


def _piece(key: Any, z: Tensor, dims: int) -> _Piece:
    """A layer's or a head's tensor; `dims` is 1 without positions, 2 with, 3 with batch rows too."""
    if not 1 <= dims <= 3 or not z.is_floating_point():
        raise ValueError(
            f"z of {key!r} has shape {list(z.shape)}; expected [Hq, Dv], [Hq, N, Dv] or [B, Hq, N, Dv] of a layer, "
            "[Dv], [N, Dv] or [B, N, Dv] of a head."
        )
    if dims == 1:
        return _Piece(None, z[None, :, None])
    return _Piece(0, z[None] if dims == 2 else z)

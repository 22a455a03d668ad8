"""The gate of DuoAttention: z' = g * full + (1 - g) * streaming, with a gate for each key head (arXiv 2410.10819).

Two calls of attention a layer, or one where the full output was recorded before; gradients flow to the gates, and no
attention matrix is formed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from attnlab_kernels import Emit, Emitted
from jaxtyping import Float
from torch import Tensor

from attnlab.capture.call import Site
from attnlab.capture.intervention import Outcome, PatternEdit, Solver, Variant
from attnlab.capture.merge import is_empty
from attnlab.errors import AttnlabError
from attnlab.interventions import Streaming
from attnlab_analyses.duo import Sizes


@dataclass(frozen=True, eq=False)
class Gated(PatternEdit):
    """Mix every head's output with what it would be over the first and the recent tokens alone.

    Attributes:
        gates: [layers, key heads], 1 for full attention and 0 for streaming; may require gradients.
        sizes: what a streaming head sees.
        full: full attention's output [B, Hq, N, Dv] by layer, as recorded in a run without gates; computed anew from
            the gated run's own queries, keys and values where it is None.

    Raises:
        AttnlabError: in the forward, where statistics of the pattern are asked for too.

    Example:
        >>> import attnlab
        >>> model, ids = attnlab.load_model("known-circuit", device="cpu"), torch.tensor([[0, 5, 6, 5, 6]])
        >>> with attnlab.capture(model, interventions=[Gated("all", torch.ones(2, 8), Sizes(1, 2))]):
        ...     gated = model.hf(ids)
        >>> bool(torch.allclose(gated, model.hf(ids), atol=1e-5))
        True
    """

    gates: Float[Tensor, "L K"]
    sizes: Sizes
    full: Mapping[int, Tensor] | None = None

    stage = 2

    def edit(self, solver: Solver, site: Site, heads: tuple[int, ...], backend: str) -> Iterable[Variant]:
        """The mixture."""
        restricted = Streaming("all", first_tokens=self.sizes.sink, window=self.sizes.recent)
        streaming = next(iter(restricted.edit(solver, site, heads, backend))).solver
        chosen = list(heads)
        gates = self.gates[site.layer, : site.n_key_heads].repeat_interleave(site.n_heads // site.n_key_heads)[chosen]
        known = None if self.full is None else self.full[site.layer][:, chosen]
        return [Variant(self.queries(site), _Mixed(solver, streaming, gates, known))]


@dataclass(frozen=True, eq=False)
class _Mixed(Solver):
    """Two problems, and the share [h] of the first."""

    whole: Solver
    streaming: Solver
    gates: Tensor
    known: Tensor | None

    def solve(self, emit: Emit | None, query_mask: Tensor | None, backend: str) -> Outcome:
        if emit is not None and not is_empty(emit):
            raise AttnlabError("A gated head mixes two patterns, of which there are no statistics; ask for none.")
        near = self.streaming.solve(None, query_mask, backend).z
        full = self.whole.solve(None, query_mask, backend).z if self.known is None else self.known
        wide = torch.promote_types(near.dtype, torch.float32)
        g = self.gates.to(near.device, wide)[:, None, None]
        return Outcome((g * full.to(wide) + (1 - g) * near.to(wide)).to(near.dtype), Emitted())

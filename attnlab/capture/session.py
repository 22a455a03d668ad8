"""`capture`: read the attention of a model while it runs, and change it where asked; `Session`: one open capture.

A session does not know what kind of model it reads. A front does (`attnlab.capture.huggingface` for transformers): it
sends the model's attention calls here, says where each happened (`Site`) and which problem it poses (`Arguments`), and
hands back to the model what `Session.compute` returns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, get_args

from attnlab_kernels import Emit
from torch import Tensor, nn

from attnlab.capture.arguments import Arguments
from attnlab.capture.call import Call, Kind, Site
from attnlab.capture.compute import compute_call
from attnlab.capture.intervention import Bound, Intervention
from attnlab.capture.keep import Keep, kept
from attnlab.capture.layers import recomputing
from attnlab.capture.merge import is_empty
from attnlab.errors import AttnlabError

if TYPE_CHECKING:
    from attnlab.models import Model

EmitChoice = Emit | Callable[[Site], Emit | None]


class Session:
    """An open capture.

    Args:
        emit, qkv, on_call, keep, interventions, backend: as `capture` takes them.

    Attributes:
        calls: the attention calls so far, in order; empty when they go to `on_call`.
        interventions: in the order in which they are applied.
        thread: the one that opened it.
    """

    def __init__(
        self,
        emit: EmitChoice | None = None,
        *,
        qkv: bool | Callable[[Site], bool] = False,
        on_call: Callable[[Call], None] | None = None,
        keep: Keep = "device",
        interventions: Sequence[Intervention] = (),
        backend: str = "auto",
    ) -> None:
        if keep not in get_args(Keep):
            raise ValueError(f"keep is {keep!r}; expected 'device' or 'cpu', or on_call to keep nothing.")
        for given in interventions:
            if not isinstance(given, Intervention):
                raise ValueError(
                    f"interventions holds a {type(given).__name__}; expected those of attnlab.interventions."
                )
        self.calls: list[Call] = []
        self.interventions = tuple(sorted(interventions, key=lambda edit: edit.stage))
        self.thread = threading.get_ident()
        self._emit: EmitChoice = Emit() if emit is None else emit
        self._qkv = qkv
        self._on_call = on_call
        self._keep = keep
        self._backend = backend
        self._heads: dict[Kind, dict[int, int]] = {}
        self._reached: set[tuple[int, int]] = set()

    def bind(self, site: Site) -> list[Bound]:
        """This session's interventions that are about a call.

        Raises:
            AttnlabError: one names a head that the layer does not have.
        """
        found = ((edit, edit.heads_at(site)) for edit in self.interventions)
        return [Bound(edit, site, heads) for edit, heads in found if heads]

    def wants(self, site: Site) -> tuple[Emit | None, bool]:
        """The statistics of a call, and whether to keep its q, k, v and z; (None, False) leaves it unrecorded."""
        emit = self._emit if isinstance(self._emit, Emit) else self._emit(site)
        return emit, self._qkv if isinstance(self._qkv, bool) else self._qkv(site)

    def compute(
        self,
        site: Site,
        arguments: Arguments,
        own: Callable[[], Tensor],
        edits: Sequence[Bound] | None = None,
        *,
        formed: bool = False,
    ) -> Tensor:
        """Compute one attention call, with its interventions and statistics, and record it.

        Args:
            site: where it happens; `site_of` makes it.
            arguments: the problem that the model poses. Nothing else of the model is read.
            own: computes the model's own attention, z [B, Hq, Nq, Dv]; called where nothing is asked for of a head.
            edits: interventions to apply, this session's by default. Fronts that send a call to several sessions pass
                those of all of them, so that each sees the same pattern.
            formed: whether the model goes on with `own` in any case, since somebody else looked at its pattern.

        Returns:
            z [B, Hq, Nq, Dv], what the model is to go on with.

        Raises:
            AttnlabError: an intervention does not suit the call.
        """
        self._heads.setdefault(site.kind, {})[site.layer] = site.n_heads
        mine = self.bind(site) if edits is None else edits
        emit, qkv = self.wants(site)
        if not mine and emit is None and not qkv:
            return own()
        if mine or not is_empty(emit):
            self.before_kernels(arguments)
        z, emitted, reached = compute_call(site, arguments, own, emit, _in_order(mine), self._backend, formed=formed)
        self._reached.update((id(bound.intervention), bound.site.layer) for bound in reached)
        if (emit is not None or qkv) and not recomputing():
            tensors = (arguments.q, arguments.k, arguments.v, z) if qkv else (None,) * 4
            self._record(Call(site, emitted, arguments.scale, *tensors))
        return z

    def before_kernels(self, arguments: Arguments) -> None:
        """Called before attnlab's own attention computes a call; a front may warn here."""

    def _record(self, call: Call) -> None:
        call = kept(call, self._keep)
        if self._on_call is None:
            self.calls.append(call)
        else:
            self._on_call(call)

    def open(self) -> None:
        """Send the model's attention calls here."""

    def close(self) -> None:
        """Leave the model as it was; calling it again changes nothing."""

    def check(self) -> None:
        """Make sure that every intervention found its layers, heads and positions.

        Raises:
            AttnlabError: the model ran, and one did not.
        """
        if not self._heads:
            return
        for edit in self.interventions:
            heads = self._heads.get(edit.kind, {})
            edit.check_layers(heads)
            layers = heads if edit.chosen is None else edit.chosen
            missed = [layer for layer in layers if (id(edit), layer) not in self._reached]
            if missed:
                raise AttnlabError(
                    f"{edit.describe()} never changed anything in {edit.kind} layer {missed[0]}: no call had the "
                    "positions, keys or rows that it is about."
                )


def _in_order(edits: Sequence[Bound]) -> list[Bound]:
    return sorted(edits, key=lambda bound: bound.intervention.stage)


def site_of(
    kind: Kind, layer: int, arguments: Arguments, query_mask: Tensor | None = None, key_mask: Tensor | None = None
) -> Site:
    """The site of a call that poses this problem.

    Args:
        kind, layer: which attention it is.
        arguments: the problem.
        query_mask: [B, Nq] booleans, False for queries that are padding; None without any.
        key_mask: [B, Nk] booleans, False for keys that are padding; None without any.
    """
    batch, n_heads, n_queries, _ = arguments.q.shape
    return Site(
        layer=layer, kind=kind, n_heads=n_heads, n_key_heads=arguments.k.shape[1], batch=batch, n_queries=n_queries,
        n_keys=arguments.k.shape[2], query_mask=query_mask, key_mask=key_mask, causal=arguments.causal,
        query_offset=arguments.query_offset, window=arguments.window, device=arguments.q.device,
    )  # fmt: skip


@contextmanager
def capture(
    model: Model | nn.Module,
    *,
    emit: EmitChoice | None = None,
    qkv: bool | Callable[[Site], bool] = False,
    on_call: Callable[[Call], None] | None = None,
    keep: Keep = "device",
    interventions: Sequence[Intervention] = (),
    backend: str = "auto",
) -> Iterator[Session]:
    """Read the attention of every call that the model makes inside the `with` block; its outputs stay the same.

    With interventions the outputs are those of the edited model, and the statistics those of the edited pattern.
    Captures nest: the interventions of all of them are applied, and each records. Forwards of a thread go to the
    captures that this thread opened, and without one to every capture that is open. Under gradient checkpointing the
    backward pass belongs inside the block too; the calls that it repeats are edited again and not recorded again.

    Args:
        model: a `Model`, a transformers module, one of TransformerLens (see `attnlab.lens.session`), or any torch
            module that calls `F.scaled_dot_product_attention` (see `attnlab.capture.any_module`).
        emit: the statistics to compute, or a function of the site that says so; None from it leaves the call to the
            model's own attention, unrecorded, and an empty `Emit()` (the default) records it without statistics.
        qkv: whether to keep q, k, v as the model made them and z as it went on, or a function of the site.
        on_call: takes each call as it happens; without it they are collected in `session.calls`.
        keep: `"cpu"` copies what is kept of each call to the CPU at once, `"device"` leaves it where it is.
        interventions: edits of heads, from `attnlab.interventions`; see `attnlab.capture.intervention` for the order.
        backend: of `attnlab_kernels.attention`.

    Raises:
        ValueError: an argument that is no such thing.
        AttnlabError: dropout is on, the model is no module, or an intervention names what it does not have (at the end
            of the block at the latest).
        UnsupportedModelError: at the end of the block, when the model ran and some of its attention was not seen.

    Example:
        >>> import torch
        >>> from attnlab_kernels import Emit
        >>> from transformers import GPT2Config, GPT2Model
        >>> gpt2 = GPT2Model(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=10, n_positions=8)).eval()
        >>> with capture(gpt2, emit=Emit(entropy=True)) as session:
        ...     _ = gpt2(torch.tensor([[1, 2, 3]]))
        >>> [(call.kind, call.layer, tuple(call.emitted.entropy.shape)) for call in session.calls]
        [('self', 0, (1, 2, 3)), ('self', 1, (1, 2, 3))]
    """
    session = _front_of(model)(
        model, emit, qkv=qkv, on_call=on_call, keep=keep, interventions=interventions, backend=backend
    )
    try:
        session.open()
        yield session
    finally:
        session.close()
    session.check()


def _front_of(model: Model | nn.Module) -> Callable[..., Session]:
    from attnlab.capture.huggingface import HuggingFaceSession
    from attnlab.lens.parts import lens_style
    from attnlab.models import Model

    module = model.captured if isinstance(model, Model) else model
    if lens_style(module) is not None:
        from attnlab.lens.session import LensSession

        return LensSession
    from transformers import PreTrainedModel

    if isinstance(module, PreTrainedModel) or not isinstance(module, nn.Module):
        return HuggingFaceSession
    from attnlab.capture.any_module import TorchSession

    return TorchSession

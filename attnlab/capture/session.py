"""`capture`: read the attention of a transformers model while it runs, without changing what it computes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from attnlab_kernels import Emit, Emitted, attention
from torch import Tensor, nn

from attnlab.capture.arguments import Arguments, read_arguments
from attnlab.capture.call import Call, Kind, Site
from attnlab.capture.dispatch import close_session, open_session, original_implementation, own_attention
from attnlab.capture.layers import LayerKey, Watcher, recomputing
from attnlab.errors import AttnlabError, AttnlabWarning, UnsupportedModelError

if TYPE_CHECKING:
    from attnlab.models import Model

_LARGE_BIAS = 64_000_000
"""Bytes of a position bias (T5 and its kin form it themselves) from which on a user is told of it."""

EmitChoice = Emit | Callable[[Site], Emit | None]


class Session:
    """An open capture.

    Attributes:
        calls: the attention calls so far, in order; empty when they go to `on_call`.
        model: the transformers module being read.
        watcher: follows its forwards.
        switched: configurations that this session sends to attnlab's attention function.
    """

    def __init__(
        self,
        model: nn.Module,
        emit: EmitChoice,
        qkv: bool | Callable[[Site], bool],
        on_call: Callable[[Call], None] | None,
        backend: str,
        numbering: Mapping[LayerKey, int] | None = None,
    ) -> None:
        self.calls: list[Call] = []
        self.model = model
        self.watcher = Watcher(model, numbering)
        self.switched: list[Any] = []
        self._emit = emit
        self._qkv = qkv
        self._on_call = on_call
        self._backend = backend
        self._warned = False

    def owns(self, module: nn.Module) -> bool:
        """Whether a module is part of the captured model."""
        return id(module) in self.watcher.paths

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keywords: dict[str, Any]
    ) -> Tensor:
        """Compute one attention call and record it: [B, Nq, Hq, Dv]."""
        kind, layer = self.watcher.locate(module)
        arguments = read_arguments(module, q, k, v, mask, keywords, original_implementation(module.config))
        site = self._site(kind, layer, arguments)
        emit = self._emit if isinstance(self._emit, Emit) else self._emit(site)
        qkv = self._qkv if isinstance(self._qkv, bool) else self._qkv(site)
        if emit is None and not qkv:
            return own_attention(module, q, k, v, mask, keywords)
        if emit is None or is_empty(emit):
            out, emitted = own_attention(module, q, k, v, mask, keywords), Emitted()
        else:
            self._warn_of_squares(arguments)
            z, emitted = attention(
                arguments.q, arguments.k, arguments.v, **arguments.options(), query_mask=site.query_mask, emit=emit,
                backend=self._backend,
            )  # fmt: skip
            out = z.transpose(1, 2).contiguous()
        if recomputing():
            return out
        kept = (arguments.q, arguments.k, arguments.v, out.transpose(1, 2)) if qkv else (None,) * 4
        call = Call(site, emitted, arguments.scale, *kept)
        if self._on_call is None:
            self.calls.append(call)
        else:
            self._on_call(call)
        return out

    def _site(self, kind: Kind, layer: int, a: Arguments) -> Site:
        batch, n_heads, n_queries, _ = a.q.shape
        n_keys = a.k.shape[2]
        queries = None
        if a.padding is not None and kind != "cross" and 0 <= a.query_offset <= n_keys - n_queries:
            queries = a.padding[:, a.query_offset : a.query_offset + n_queries]
        else:
            queries = self.watcher.query_padding(kind, batch, n_queries)
        if a.rows is not None:
            queries = a.rows if queries is None else queries & a.rows
        keys = a.padding if a.padding is not None else self.watcher.key_padding(kind, batch, n_keys)
        return Site(
            layer=layer, kind=kind, n_heads=n_heads, n_key_heads=a.k.shape[1], batch=batch, n_queries=n_queries,
            n_keys=n_keys, query_mask=queries, key_mask=keys, causal=a.causal, query_offset=a.query_offset,
            window=a.window, device=a.q.device,
        )  # fmt: skip

    def _warn_of_squares(self, arguments: Arguments) -> None:
        """Say once what is held that grows with the square of the length."""
        bias = arguments.bias
        bias_bytes = 0 if bias is None or 1 in bias.shape[-2:] else bias.numel() * bias.element_size()
        if self._warned or not (arguments.whole or bias_bytes > _LARGE_BIAS):
            return
        self._warned = True
        name = type(self.model).__name__
        if arguments.whole:
            what = f"uses an attention mask that is no closed form; it is held whole ({arguments.whole / 1e6:.1f} MB)"
        else:
            what = f"forms a bias for every query and key by itself ({bias_bytes / 1e6:.0f} MB)"
        warnings.warn(f"{name} {what}, so memory grows with the square of the length.", AttnlabWarning, stacklevel=2)

    def check(self) -> None:
        """Make sure that every attention layer called, and as often as the others of its kind.

        Raises:
            UnsupportedModelError: the model computes attention that the capture does not see.
        """
        watcher, name = self.watcher, type(self.model).__name__
        if not watcher.forwards:
            return
        silent = {path: cls for path, cls in watcher.silent.items() if any(part.isdigit() for part in path.split("."))}
        if silent or not watcher.calls:
            which = f" ({', '.join(sorted(set(silent.values())))})" if silent else ""
            raise UnsupportedModelError(
                f"{name} computes its attention{which} without calling transformers' attention interface, so attnlab "
                "cannot read it."
            )
        for kind in {kind for kind, _ in watcher.calls}:
            known = {layer for (k, _, _), layer in watcher.numbering.items() if k == kind}
            counts = {layer: watcher.calls[kind, layer] for layer in sorted(known)}
            if len(set(counts.values())) > 1:
                raise UnsupportedModelError(
                    f"The {kind} attention layers of {name} did not all call the attention interface equally often "
                    f"(calls by layer: {counts}), so what was read is incomplete."
                )


def is_empty(emit: Emit) -> bool:
    """Whether nothing is asked for.

    Example:
        >>> is_empty(Emit()), is_empty(Emit(entropy=True))
        (True, False)
    """
    return all(getattr(emit, f.name) is f.default for f in fields(emit))


@contextmanager
def capture(
    model: Model | nn.Module,
    *,
    emit: EmitChoice | None = None,
    qkv: bool | Callable[[Site], bool] = False,
    on_call: Callable[[Call], None] | None = None,
    backend: str = "auto",
) -> Iterator[Session]:
    """Read the attention of every call that the model makes inside the `with` block; its outputs stay the same.

    Under gradient checkpointing the backward pass belongs inside the block too; the calls that it repeats are not
    recorded again.

    Args:
        model: a `Model` or a transformers module.
        emit: the statistics to compute, or a function of the site that says so; None from it leaves the call to the
            model's own attention, unrecorded, and an empty `Emit()` (the default) records it without statistics.
        qkv: whether to keep q, k, v and z of a call, or a function of the site.
        on_call: takes each call as it happens; without it they are collected in `session.calls`.
        backend: of `attnlab_kernels.attention`.

    Raises:
        AttnlabError: dropout is on, or the module is none of transformers.
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
    from transformers import PreTrainedModel

    from attnlab.models import Model

    module = model.hf if isinstance(model, Model) else model
    if not isinstance(module, PreTrainedModel):
        raise AttnlabError(f"Only models of transformers can be captured, and {type(module).__name__} is none.")
    numbering = model.numbering if isinstance(model, Model) else None
    session = Session(module, Emit() if emit is None else emit, qkv, on_call, backend, numbering)
    try:
        open_session(session)
        session.watcher.attach()
        yield session
    finally:
        session.watcher.detach()
        close_session(session)
    session.check()

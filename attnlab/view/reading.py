"""`view`: run a model on one text and keep the attention rows of every head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from attnlab_kernels import Emit

from attnlab.capture import capture
from attnlab.capture.call import Call, Site
from attnlab.errors import AttnlabError
from attnlab.runs.analysis import Batch
from attnlab.view.text_view import KindView, TextView
from attnlab.view.tokens import token_labels

if TYPE_CHECKING:
    from attnlab.models import Model

MOST_BYTES = 8_000_000
"""Weights that one view may hold, a byte each."""
_ORDER = ("self", "cross", "encoder")

Text = str | Sequence[int] | torch.Tensor


def view(model: object, text: Text, *, target: Text | None = None, max_tokens: int = 96) -> TextView:
    """The attention of every head on one text, to look at one head and one token at a time.

    Args:
        model: what `attnlab.load_model` gives, or anything that it takes.
        text: a text, or token ids.
        target: what the decoder of an encoder-decoder reads; the text itself, shifted by one, when None.
        max_tokens: most tokens to show; fewer where layers x heads x tokens^2 would exceed 8 MB. The rest of the text
            is not run.

    Returns:
        a `TextView`: the last line of a notebook's cell shows it, `.html()` is a page, `.patterns` the numbers.

    Raises:
        AttnlabError: the text is empty or does not suit the model.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=10, n_positions=8)).eval()
    >>> view(gpt2, [1, 2, 3]).patterns.shape
    (2, 2, 3, 3)
    """
    from attnlab.models import load_model
    from attnlab.runs.data import read_sequences

    if max_tokens < 1:
        raise AttnlabError(f"At most {max_tokens} tokens are to be shown; give at least 1.")
    loaded = load_model(model)  # type: ignore[arg-type]
    if target is not None and not loaded.is_encoder_decoder:
        raise AttnlabError(f"{loaded.name} has no decoder that reads a target beside the text; leave the target out.")
    asked: list[object] = [_plain(text)]
    if target is not None:
        column = "text" if isinstance(text, str) else "input_ids"
        asked = [{column: _plain(text), "target": _plain(target)}]
    whole = read_sequences(asked, loaded)  # type: ignore[arg-type]
    decoder_ids = whole.decoder_ids[0].tolist() if whole.decoder_ids is not None else None
    return beginning(loaded, whole.ids[0].tolist(), decoder_ids, max_tokens=max_tokens)


def beginning(
    model: Model,
    ids: Sequence[int],
    decoder_ids: Sequence[int] | None = None,
    *,
    max_tokens: int,
    most_bytes: int = MOST_BYTES,
) -> TextView:
    """The view of the first tokens of a sequence: `max_tokens`, or as many as `most_bytes` of weights hold."""
    heads = sum(sum(layers) for layers in model.layout.heads.values())
    fitting = max(1, math.isqrt(most_bytes // max(heads, 1)))
    most = min(max_tokens, fitting)
    note = _note(len(ids), 0 if decoder_ids is None else len(decoder_ids), most, fitting < max_tokens)
    return view_of_ids(model, ids[:most], None if decoder_ids is None else decoder_ids[:most], note=note)


def view_of_ids(
    model: Model, ids: Sequence[int], decoder_ids: Sequence[int] | None = None, *, note: str = ""
) -> TextView:
    """The view of token ids as they are; `decoder_ids` as the decoder reads them, start token included."""
    batch = Batch(
        index=(0,),
        input_ids=torch.tensor([list(ids)], device=model.device),
        attention_mask=torch.ones(1, len(ids), dtype=torch.bool, device=model.device),
        decoder_input_ids=None if decoder_ids is None else torch.tensor([list(decoder_ids)], device=model.device),
        decoder_attention_mask=(
            None if decoder_ids is None else torch.ones(1, len(decoder_ids), dtype=torch.bool, device=model.device)
        ),
    )
    rows: dict[str, dict[int, np.ndarray]] = {}

    def keep(call: Call) -> None:
        assert call.emitted.rows is not None
        rows.setdefault(call.kind, {})[call.layer] = call.emitted.rows[0].float().cpu().numpy()

    with capture(model, emit=_all_rows, on_call=keep):
        model.forward(batch)
    source = token_labels(model, ids)
    own = source if decoder_ids is None else token_labels(model, decoder_ids)
    sides = {"self": (own, own), "encoder": (source, source), "cross": (own, source)}
    kinds = {kind: _kind_view(kind, rows[kind], *sides[kind]) for kind in _ORDER if kind in rows}
    return TextView(model.name, kinds, note)


def _all_rows(site: Site) -> Emit:
    return Emit(rows=torch.arange(site.n_queries, device=site.device))


def _kind_view(kind: str, layers: dict[int, np.ndarray], queries: list[str], keys: list[str]) -> KindView:
    patterns = [layers[layer] for layer in sorted(layers)]
    heads = tuple(p.shape[0] for p in patterns)
    shape = (len(patterns), max(heads), max(p.shape[1] for p in patterns), max(p.shape[2] for p in patterns))
    weights = np.zeros(shape, dtype=np.float32)
    for layer, pattern in enumerate(patterns):
        h, q, k = pattern.shape
        weights[layer, :h, :q, :k] = np.nan_to_num(pattern)
    return KindView(kind, weights, heads, _fitted(queries, shape[2]), _fitted(keys, shape[3]))


def _fitted(labels: list[str], length: int) -> tuple[str, ...]:
    """Labels for every place; numbers where a model puts tokens of its own before the text's."""
    return tuple(labels) if len(labels) == length else tuple(f"#{i}" for i in range(length))


def _note(length: int, decoder_length: int, most: int, short_of_room: bool) -> str:
    if max(length, decoder_length) <= most:
        return ""
    why = ", as many as all heads of this model leave room for" if short_of_room else ""
    parts = [
        f"the first {most} of {n:,} tokens{of}"
        for n, of in ((length, ""), (decoder_length, " of the target"))
        if n > most
    ]
    return f"Shown: {' and '.join(parts)}{why}."


def _plain(text: object) -> object:
    if isinstance(text, str):
        return text
    if isinstance(text, torch.Tensor | np.ndarray):
        text = text.tolist()
    if not isinstance(text, Sequence):
        raise AttnlabError(f"A text or a list of token ids was expected; got {text!r}.")
    ids = [int(i) if isinstance(i, np.integer) else i for i in text]
    return ids[0] if len(ids) == 1 and isinstance(ids[0], list) else ids

"""Next-token loss without the N x V logits: the model's own head runs on a few positions at a time.

Heads differ (scaled, softcapped, biased, tied), so the model's own forward computes the logits, with its body replaced
by one that hands over hidden states computed before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


def next_token_loss(
    model: nn.Module,
    body: nn.Module,
    outputs: Any,
    ids: Tensor,
    mask: Tensor,
    arguments: dict[str, Any],
    chunk: int = 256,
) -> Tensor:
    """Loss of each token given those before it.

    Args:
        model: has a head over the vocabulary.
        body: the part of `model` that computes the hidden states.
        outputs: what `body` computed, with `last_hidden_state` [B, N, width].
        ids: [B, N] tokens.
        mask: [B, N] booleans, False for padding.
        arguments: what to call `model` with, beside the tokens.
        chunk: positions whose logits are held at once.

    Returns:
        [B, N - 1] float32, nats; 0 where the token or the one before it is padding.
    """
    hidden = outputs.last_hidden_state
    counts = mask[:, 1:] & mask[:, :-1]
    loss = torch.zeros(ids.shape[0], max(ids.shape[1] - 1, 0), device=hidden.device)
    for start in range(0, loss.shape[1], chunk):
        end = min(start + chunk, loss.shape[1])
        with _handing_over(body, type(outputs)(last_hidden_state=hidden[:, start:end])):
            logits = model(**arguments).logits
        flat = logits.float().flatten(0, 1)
        loss[:, start:end] = cross_entropy(flat, ids[:, start + 1 : end + 1].flatten(), reduction="none").view(
            len(ids), -1
        )
    return loss.masked_fill(~counts, 0.0)


@contextmanager
def _handing_over(body: nn.Module, outputs: Any) -> Iterator[None]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return outputs

    own = body.__dict__.get("forward")
    body.forward = forward
    try:
        yield
    finally:
        if own is None:
            del body.__dict__["forward"]
        else:
            body.forward = own

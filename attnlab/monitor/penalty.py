"""A term for the loss that holds attention entropy up.

Each head pays ln(floor / h) while its normalised entropy h, averaged over the rows of the batch, is below the floor,
and nothing above it. The logarithm matters: of a row that is nearly one key, entropy itself has hardly a gradient,
since with one logit s above the others H is about (T - 1) e^-s (1 + s), and dH/ds vanishes with H; d ln H / ds tends
to -1. It is the head's mean that counts, so single rows may be as sharp as they like.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from attnlab_kernels import Emit
from jaxtyping import Float
from torch import Tensor

from attnlab.capture.call import Call
from attnlab.errors import AttnlabError
from attnlab.monitor.rows import row_entropy

ENTROPY = Emit(entropy=True, visible=True)
"""What a capture has to emit for the penalty."""
_LEAST = 1e-4
"""Float32 knows an entropy no better than this once a row is one key; the penalty ends there, and its gradient."""


def entropy_penalty(calls: Iterable[Call], floor: float = 0.2) -> Float[Tensor, ""]:
    """What a batch pays for heads of low entropy, to be added to its loss.

    Args:
        calls: of a capture with `emit=Emit(entropy=True, visible=True)`, with gradients on. Calls of the same layer
            count as heads of their own.
        floor: normalised entropy, from 0 to 1, below which a head pays.

    Returns:
        Mean over heads of max(0, ln(floor / h)), a scalar; 0 when all heads are above. Heads whose rows all see one
        key do not count.

    Raises:
        AttnlabError: there are no calls, they hold no entropy or no gradient, or the floor is no share.

    Example:
        >>> import attnlab
        >>> model = attnlab.load_model("pydoc-4l", device="cpu")
        >>> ids = torch.tensor([[5, 6, 7, 8]])
        >>> with attnlab.capture(model, emit=attnlab.Emit(entropy=True, visible=True)) as session:
        ...     loss = model.hf(input_ids=ids, labels=ids).loss
        >>> (loss + 0.1 * entropy_penalty(session.calls, floor=0.3)).backward()
    """
    if isinstance(floor, bool) or not isinstance(floor, int | float) or not 0 < floor <= 1:
        raise AttnlabError(f"The floor is a normalised entropy above 0 and at most 1; got {floor!r}.")
    paid = []
    for call in calls:
        rows = row_entropy(call)
        if not rows.entropy.requires_grad and torch.is_grad_enabled():
            raise AttnlabError(
                f"The entropy of {call.kind} layer {call.layer} has no gradient; capture a model whose weights are "
                "trained, outside of torch.no_grad and without aside=True."
            )
        number = rows.spread.sum((0, 2))
        mean = torch.where(rows.spread, rows.normalized, 0.0).sum((0, 2)) / number.clamp(min=1)
        # A floor below which nothing is paid more keeps the gradient finite.
        head = torch.relu(torch.log(floor / mean.clamp(min=_LEAST)))
        paid.append(head[number > 0])
    if not paid:
        raise AttnlabError("There are no calls to penalise; run the model inside the capture first.")
    every = torch.cat([heads.to(paid[0].device) for heads in paid])
    return every.mean() if every.numel() else every.sum()

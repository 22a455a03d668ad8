"""`mean_outputs`: the mean z of every head over a reference set, for mean ablation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnlab.capture.call import Call, Kind
from attnlab.capture.session import capture
from attnlab.capture.where import first_position
from attnlab.errors import AttnlabError

if TYPE_CHECKING:
    from attnlab.models import Model
    from attnlab.runs.analysis import Batch


@torch.no_grad()
def mean_outputs(
    model: Model | nn.Module, data: Iterable[Tensor | Mapping[str, Any] | Batch], *, by_position: bool = False
) -> dict[tuple[Kind, int], Tensor]:
    """The mean z of every head over the tokens of a reference set; padding does not count.

    Args:
        model: a `Model` or a transformers module.
        data: batches: token ids [B, N], the keyword arguments of a forward, or a `Batch` (for a `Model`).
        by_position: a mean for each position, over the sequences that reach it.

    Returns:
        [Hq, Dv] for each kind and layer, or [Hq, N, Dv] with `by_position`, where a position that no sequence reaches
        is nan, which no intervention takes. float32, float64 of a float64 model.

    Raises:
        ValueError: a batch that is none.
        AttnlabError: there was no data, or nothing but padding.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> gpt2 = GPT2Model(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=10, n_positions=8)).eval()
        >>> {key: tuple(z.shape) for key, z in mean_outputs(gpt2, [torch.tensor([[1, 2, 3]])]).items()}
        {('self', 0): (2, 8), ('self', 1): (2, 8)}
    """
    from attnlab.models import Model
    from attnlab.runs.analysis import Batch

    sums: dict[tuple[Kind, int], Tensor] = {}
    counts: dict[tuple[Kind, int], Tensor] = {}
    dtypes: dict[tuple[Kind, int], torch.dtype] = {}

    def add(call: Call) -> None:
        assert call.z is not None
        key, site = (call.kind, call.layer), call.site
        exact = torch.float32 if call.z.device.type == "mps" else torch.float64
        valid = site.query_mask
        ones = torch.ones(site.batch, site.n_queries, dtype=torch.bool, device=call.z.device)
        valid = ones if valid is None else valid
        z = torch.where(valid[:, None, :, None], call.z.to(exact), 0).sum(0)
        count = valid.to(exact).sum(0)
        if not by_position:
            z, count = z.sum(1, keepdim=True), count.sum(0, keepdim=True)
        start = first_position(site) if by_position else 0
        end = start + z.shape[1]
        total, number = sums.get(key), counts.get(key)
        if total is None or number is None:
            total, number = z.new_zeros(z.shape[0], end, z.shape[2]), count.new_zeros(end)
        more = max(end - total.shape[1], 0)
        total = torch.nn.functional.pad(total, (0, 0, 0, more))
        number = torch.nn.functional.pad(number, (0, more))
        total[:, start:end] += z
        number[start:end] += count
        sums[key], counts[key] = total, number
        dtypes[key] = torch.promote_types(call.z.dtype, torch.float32)

    module = model.hf if isinstance(model, Model) else model

    def there(given: Any) -> Any:
        return given.to(model.device) if isinstance(model, Model) and isinstance(given, Tensor) else given

    with capture(model, qkv=True, on_call=add):
        for batch in data:
            if isinstance(batch, Tensor):
                if batch.dim() < 2:
                    raise ValueError(
                        f"data holds a tensor of shape {list(batch.shape)}; expected token ids [B, N], batch by batch."
                    )
                module(there(batch))
            elif isinstance(batch, Mapping):
                module(**{name: there(given) for name, given in batch.items()})
            elif not isinstance(batch, Batch):
                raise ValueError(
                    f"data holds a {type(batch).__name__}; expected token ids [B, N], the keyword arguments of a "
                    "forward, or a Batch."
                )
            elif isinstance(model, Model):
                model.forward(batch)
            else:
                raise AttnlabError(f"A Batch needs an attnlab Model, and {type(model).__name__} is none.")
    if not sums:
        raise AttnlabError("mean_outputs got no data; expected at least one batch.")
    for (kind, layer), number in counts.items():
        if not bool(number.any()):
            raise AttnlabError(f"mean_outputs got nothing but padding in {kind} layer {layer}; expected tokens.")
    means = {key: (sums[key] / counts[key][:, None]).to(dtypes[key]) for key in sums}
    return means if by_position else {key: mean[:, 0] for key, mean in means.items()}

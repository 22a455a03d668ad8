"""The key-bias account of a sink: its key and value against the others', and how much queries point along it.

Gu et al., "When Attention Sink Emerges in Language Models" (arXiv 2410.10781): the first token's key and value have
small norms, and queries have a high cosine with its key, so that it draws attention whatever the query says and adds
little to the output: it acts as a bias of the keys.

Norms are relative to the mean norm of the sequence's keys that are no sinks. Cosines are of q and k as attention
compares them (after rotary embedding); of each row the one with the sink is set beside the mean over the other keys
that this row sees, so that both are means over the same rows. Nothing of size N x N is formed: the mean over the keys
that a row sees is its query's product with a running sum of unit keys. Rows that see other keys than causality, window
and padding say (packed documents, a mask of the user's own) are left out of the cosines.

Shapes: B sequences, Hq query heads, Hkv key heads, Nq queries, Nk keys, D size of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnlab.capture.call import Call, Site
from attnlab.results import Metric
from attnlab_analyses.received import Received
from attnlab_analyses.rows import at_least_float32, float64

METRICS = {
    "first_key_norm": Metric("Norm of the first key", "", "over the mean norm of the keys that are no sinks", 0.0),
    "first_value_norm": Metric(
        "Norm of the first value", "", "over the mean norm of values of keys that are no sinks", 0.0
    ),
    "first_key_cosine": Metric("Cosine with the first key", "", "mean over query rows of cos(q, k₁)"),
    "other_key_cosine": Metric("Cosine with other keys", "", "mean over query rows and keys that are no sinks"),
    "beyond_key_norm": Metric("Norm of later sinks' keys", "", "over the mean norm of the keys that are no sinks", 0.0),
    "beyond_value_norm": Metric(
        "Norm of later sinks' values", "", "over the mean of values of keys that are no sinks", 0.0
    ),
    "beyond_key_cosine": Metric("Cosine with later sinks' keys", "", "mean over the query rows that see one"),
}


def key_bias(call: Call, keys: Received, beyond: Tensor, rows: Tensor, visible: Tensor) -> dict[str, Tensor]:
    """The metrics of each sequence and query head, [B, Hq]; NaN where a sequence has none.

    Args:
        call: with q, k and v.
        keys: what its keys receive.
        beyond: [B, Hq, Nk] sinks past the first position.
        rows: [B, Hq, Nq] rows that count.
        visible: [B, Hq, Nq] number of keys that each row sees.
    """
    assert call.q is not None
    assert call.k is not None
    assert call.v is not None
    n_heads = call.site.n_heads
    group = n_heads // call.k.shape[1]
    device = float64(call.k[:0]).device
    position, beyond, rows, visible = (t.to(device) for t in (keys.position, beyond, rows, visible))
    there, first = position >= 0, position == 0
    beyond = beyond & there[:, None, :]
    others = (there & ~first)[:, None, :] & ~beyond
    first = first[:, None, :].expand_as(beyond)
    found: dict[str, Tensor] = {}
    for name, tensor in (("key", call.k), ("value", call.v)):
        norms = float64(at_least_float32(tensor).norm(dim=-1)).repeat_interleave(group, dim=1)
        usual = _mean(norms, others)
        usual = torch.where(usual > 0, usual, torch.nan)
        found[f"first_{name}_norm"] = _mean(norms, first) / usual
        found[f"beyond_{name}_norm"] = _mean(norms, beyond) / usual

    seen = _seen(call.site)
    number = {"all": _count(there, seen)[:, None], "first": _count(first[:, 0], seen)[:, None]}
    of_first, of_all, of_beyond = (
        torch.zeros(visible.shape, dtype=torch.float64, device=norms.device) for _ in range(3)
    )
    n_beyond = torch.zeros_like(of_beyond)
    # Head by head, so that what is held beside q and k grows with the length alone.
    for g in range(call.k.shape[1]):
        k = torch.where(there[..., None], _unit(call.k[:, g]), 0.0)
        k_first = (k * first[:, 0, :, None]).sum(1)
        total = _running(k, seen)
        for h in range(g * group, (g + 1) * group):
            q = _unit(call.q[:, h])
            of_all[:, h] = (q * total).sum(-1)
            of_first[:, h] = (q @ k_first[..., None])[..., 0]
            if bool(beyond[:, h].any()):
                of_beyond[:, h] = (q * _running(torch.where(beyond[:, h, :, None], k, 0.0), seen)).sum(-1)
                n_beyond[:, h] = _count(beyond[:, h], seen)
    of_other = of_all - number["first"] * of_first - of_beyond
    n_other = number["all"] - number["first"] - n_beyond
    plain = rows & (number["all"] == visible) & (n_other > 0)
    both = plain & (number["first"] > 0)
    found["first_key_cosine"] = _mean(of_first, both)
    found["other_key_cosine"] = _mean(of_other / n_other.clamp(min=1), both)
    found["beyond_key_cosine"] = _mean(of_beyond / n_beyond.clamp(min=1), plain & (n_beyond > 0))
    return found


class _Seen(NamedTuple):
    """Each row sees the keys from `start` up to before `stop`, both [Nq]; `later`: some begin past the first."""

    start: Tensor
    stop: Tensor
    later: bool


def _seen(site: Site) -> _Seen:
    place = torch.arange(site.n_queries, device=site.device) + site.query_offset
    start, stop = torch.zeros_like(place), torch.full_like(place, site.n_keys)
    if site.window is not None:
        start, stop = place - site.window + 1, place + site.window
    if site.causal:
        stop = place + 1
    return _Seen(start.clamp(0, site.n_keys), stop.clamp(0, site.n_keys), site.window is not None)


def _count(chosen: Tensor, seen: _Seen) -> Tensor:
    """How many of the chosen keys [B, Nk] each row sees, [B, Nq]."""
    return _running(chosen.double()[..., None], seen)[..., 0]


def _running(values: Tensor, seen: _Seen) -> Tensor:
    """Sums [B, Nq, X] of values [B, Nk, X] over the keys that each row sees."""
    sums = torch.nn.functional.pad(values.cumsum(1), (0, 0, 1, 0))
    whole = sums[:, seen.stop.to(values.device)]
    return whole - sums[:, seen.start.to(values.device)] if seen.later else whole


def _unit(vectors: Tensor) -> Tensor:
    """In double precision, since running sums of many vectors are subtracted; zero vectors stay zero."""
    return torch.nn.functional.normalize(float64(vectors), dim=-1)


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean over the last axis of the chosen values; NaN where none is."""
    number = chosen.sum(-1)
    total = torch.where(chosen, values, 0.0).sum(-1)
    return torch.where(number > 0, total / number.clamp(min=1), torch.nan)

"""The options of `attention`, as one type for every function that passes them on."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor

from attnlab_kernels.problem import RelativeBias


class Options(TypedDict, total=False):
    """What shapes the pattern beside q, k and v. `attention` says what each of them means; all may be left out.

    Example:
        >>> options: Options = {"causal": True, "window": 128}
        >>> sorted(options)
        ['causal', 'window']
    """

    scale: float | None
    causal: bool
    query_offset: int | None
    window: int | None
    first_tokens: int
    prefix: Tensor | None
    segments: Tensor | tuple[Tensor, Tensor] | None
    key_mask: Tensor | None
    query_mask: Tensor | None
    mask: Tensor | None
    bias: Tensor | None
    alibi: Tensor | None
    relative_bias: RelativeBias | None
    softcap: float | None
    sinks: Tensor | None
    normalizer: str
    sigmoid_bias: float | Tensor | None

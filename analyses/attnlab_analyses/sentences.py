"""Words that findings share: names of heads and kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attnlab.capture.call import Head, Kind
from attnlab.plots.metrics import KINDS


def heads_named(heads: Sequence[int]) -> dict[tuple[int, int], str]:
    """Names of all heads by (layer, head), from the number of heads in each layer.

    >>> heads_named([1, 2])
    {(0, 0): 'L0H0', (1, 0): 'L1H0', (1, 1): 'L1H1'}
    """
    return {(i, j): str(Head(i, j)) for i, n in enumerate(heads) for j in range(n)}


def kind_named(kind: str) -> str:
    """A kind of attention in words.

    >>> kind_named("cross")
    'cross-attention'
    """
    return KINDS.get(kind, kind)


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "sequence"), counted(1200, "sequence")
    ('1 sequence', '1,200 sequences')
    """
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def kinds_in_order(heads: Mapping[Kind, tuple[int, ...]]) -> list[tuple[Kind, tuple[int, ...]]]:
    """A layout's kinds in the order in which they are told of: `self`, `encoder`, `cross`.

    >>> kinds_in_order({"cross": (2,), "self": (4,)})
    [('self', (4,)), ('cross', (2,))]
    """
    return sorted(heads.items(), key=lambda item: list(KINDS).index(item[0]))

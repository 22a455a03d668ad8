"""What is measured of a patched run: a number for each example, computed from its logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from attnlab.errors import AttnlabError


class Rows(NamedTuple):
    """Which examples the rows of some logits are.

    Attributes:
        examples: [R] their numbers in the data.
        attention_mask: [R, N] booleans, False for padding.
    """

    examples: Int[Tensor, " R"]
    attention_mask: Bool[Tensor, "R N"]

    @property
    def last(self) -> Tensor:
        """[R], the position of each row's last token that is no padding.

        Example:
            >>> Rows(torch.tensor([0, 1]), torch.tensor([[True, True, False], [False, True, True]])).last
            tensor([1, 2])
        """
        n = self.attention_mask.shape[1]
        return n - 1 - self.attention_mask.flip(1).int().argmax(1)


Metric: TypeAlias = Callable[[Tensor, Rows], Tensor]
"""Takes logits [R, N, V] and their `Rows`; returns [R] numbers, each of its own row alone."""


def logit_difference(answers: Sequence[int] | Tensor, wrong: Sequence[int] | Tensor | None = None) -> Metric:
    """The logit of the answer less that of a wrong answer, at the last token of each row.

    Args:
        answers: [examples] token ids.
        wrong: likewise; without it the metric is the answer's logit.

    Raises:
        ValueError: ids that are no [examples] whole numbers; in the forward, ids beyond the vocabulary or too few.

    Example:
        >>> metric = logit_difference([2, 0], wrong=[1, 1])
        >>> rows = Rows(torch.tensor([1]), torch.tensor([[True, True]]))
        >>> metric(torch.tensor([[[0.0, 0.0, 0.0], [5.0, 3.0, 1.0]]]), rows)
        tensor([2.])
    """
    right = read_ids("answers", answers)
    other = None if wrong is None else read_ids("wrong", wrong)
    if other is not None and other.shape != right.shape:
        raise ValueError(f"wrong has {len(other)} ids and answers {len(right)}; expected as many.")

    def difference(logits: Tensor, rows: Rows) -> Tensor:
        last = logits[torch.arange(len(logits), device=logits.device), rows.last.to(logits.device)]

        def of(ids: Tensor) -> Tensor:
            if int(rows.examples.max()) >= len(ids):
                raise ValueError(f"There are {len(ids)} answers, and more examples; expected one for each.")
            check_vocabulary(ids, logits.shape[-1])
            mine = ids.to(rows.examples.device)[rows.examples].to(last.device)
            return last.gather(1, mine[:, None])[:, 0]

        return of(right) if other is None else of(right) - of(other)

    return difference


def read_ids(name: str, ids: Sequence[int] | Tensor) -> Tensor:
    """[examples] int64.

    Raises:
        ValueError: they are something else.
    """
    found = torch.as_tensor(ids)
    if found.dim() != 1 or not len(found) or found.is_floating_point() or found.dtype == torch.bool:
        raise ValueError(f"{name} has shape {list(found.shape)} and dtype {found.dtype}; expected one token id a row.")
    return found.long()


def check_vocabulary(ids: Tensor, vocabulary: int) -> None:
    """Raises ValueError where an id is none of the vocabulary."""
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise ValueError(f"An answer is token {int(ids.max())} or below 0; the vocabulary is 0 to {vocabulary - 1}.")


def measure(metric: Metric, logits: Tensor, rows: Rows) -> Tensor:
    """[R], what a metric gives.

    Raises:
        AttnlabError: it gives something else than a number for each row.
    """
    found = metric(logits, rows)
    if not isinstance(found, Tensor) or found.shape != (len(logits),):
        what = f"shape {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise AttnlabError(f"The metric returned {what}; expected [{len(logits)}], a number for each row of logits.")
    return found

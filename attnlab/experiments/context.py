"""What an experiment works with: the model, the data in batches, and steps whose results are kept on disk."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from attnlab.runs.analysis import Batch
from attnlab.runs.batching import Plan, batches, make_plan
from attnlab.runs.data import Sequences
from attnlab.runs.runner import pad_id_of
from attnlab.runs.store import decode_states, encode_states, one_sentence_for_disk_errors, write_atomically

if TYPE_CHECKING:
    from attnlab.models import Model

_SECONDS_BETWEEN_LINES = 10.0
_STEP = "step"


class Context:
    """What `Experiment.run` is given.

    Attributes:
        model: the model.
        sequences: the data; None for an experiment that makes its own.
        seed: of everything that is drawn.
        batch_size: most sequences in a batch; None where their lengths decide.
        folder: where results go; None for an experiment in memory.

    Example:
        >>> import torch
        >>> from attnlab import load_model
        >>> from attnlab.runs.data import read_sequences
        >>> model = load_model("pydoc-4l")
        >>> context = Context(model, read_sequences(["One text.", "And another one."], model))
        >>> [batch.index for batch in context.batches()]
        [(1, 0)]
        >>> context.step("twice", lambda: {"two": torch.tensor(2)})
        {'two': tensor(2)}
    """

    def __init__(
        self,
        model: Model,
        sequences: Sequences | None = None,
        *,
        seed: int = 0,
        batch_size: int | None = None,
        folder: Path | None = None,
        identity: str = "",
        progress: bool | None = False,
    ) -> None:
        self.model, self.sequences, self.seed, self.batch_size, self.folder = model, sequences, seed, batch_size, folder
        self._identity, self._used, self._said = identity, set[str](), time.monotonic()
        self._shown = sys.stderr.isatty() if progress is None else progress

    def batches(self, sequences: Sequences | None = None) -> Iterator[Batch]:
        """The data in batches padded on the right, on the model's device; similar lengths together.

        Args:
            sequences: others than the data.

        Raises:
            ValueError: there are none.
        """
        chosen = sequences if sequences is not None else self.sequences
        if chosen is None:
            raise ValueError("This experiment has no data; give the sequences to batch.")
        place = self.model.device
        plan: Plan = make_plan(chosen.lengths, self.batch_size, place.type)
        return batches(chosen, range(len(chosen)), plan, pad_id_of(self.model), place)

    def step(self, key: str, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """A part of the experiment; what it computed is kept, so that a start after a stop does not compute it again.

        Args:
            key: its name, of lower-case letters, digits, `-`, `_` and `.`; each may be used once.
            compute: the part. What it returns depends on the experiment's options, the model, the data and the key
                alone.

        Raises:
            ValueError: the key is no such name, or was used before.
        """
        if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", key) or key in self._used:
            raise ValueError(f"The key of a step is {key!r}; expected a file name that no other step has.")
        self._used.add(key)
        if self.folder is None:
            return _on_cpu(compute())
        path, identity = self.folder / "steps" / f"{key}.safetensors", f"{self._identity}:{key}"
        known = decode_states(path.read_bytes(), identity) if path.is_file() else None
        if known is not None:
            return known.get(_STEP, {})
        found = _on_cpu(compute())
        with one_sentence_for_disk_errors(path.parent):
            path.parent.mkdir(exist_ok=True)
        write_atomically(path, encode_states({_STEP: found}, identity))
        return found

    def say(self, text: str, done: int, total: int) -> None:
        """Progress on stderr, at most one line in ten seconds; nothing where it is not wanted."""
        if self._shown and (time.monotonic() - self._said >= _SECONDS_BETWEEN_LINES):
            self._said = time.monotonic()
            sys.stderr.write(f"{text}: {done} of {total}\n")
            sys.stderr.flush()


def _on_cpu(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in found.items()}

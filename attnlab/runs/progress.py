"""Progress on stderr: a bar on a terminal, plain lines elsewhere, nothing where it is not wanted."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts sequences and tokens, and says rate and time left.

    Args:
        shown: True for a bar on a terminal and plain lines elsewhere; None for a bar on a terminal only; False for
            nothing.
        sequences, tokens: how many there are in all.
    """

    def __init__(self, shown: bool | None, sequences: int, tokens: int) -> None:
        terminal = sys.stderr.isatty()
        size = shutil.get_terminal_size()  # tqdm shows nothing on a terminal that does not tell its size
        self._lines = bool(shown) and not terminal
        self._sequences, self._tokens = sequences, tokens
        self._done_sequences = self._done_tokens = self._computed_tokens = 0
        self._started = self._said = time.monotonic()
        self._bar = (
            tqdm(
                total=tokens,
                unit="tok",
                unit_scale=True,
                smoothing=0.1,
                ncols=size.columns,
                nrows=size.lines,
                file=sys.stderr,
            )
            if shown is not False and terminal
            else None
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def found(self, sequences: int, tokens: int) -> None:
        """What an earlier start had computed; it does not count for the rate."""
        self._done_sequences += sequences
        self._done_tokens += tokens
        if self._bar is not None:
            self._bar.initial += tokens
            self._bar.n += tokens
            self._show_sequences()

    def computed(self, sequences: int, tokens: int) -> None:
        """What has just been computed."""
        self._done_sequences += sequences
        self._done_tokens += tokens
        self._computed_tokens += tokens
        if self._bar is not None:
            self._bar.update(tokens)
            self._show_sequences()
        elif self._lines and time.monotonic() - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            rate = self._computed_tokens / (self._said - self._started)
            left = (self._tokens - self._done_tokens) / rate
            sys.stderr.write(
                f"{self._done_sequences}/{self._sequences} sequences, {rate:,.0f} tokens/s, {left:,.0f} s left\n"
            )
            sys.stderr.flush()

    def _show_sequences(self) -> None:
        assert self._bar is not None
        self._bar.set_postfix_str(f"{self._done_sequences}/{self._sequences} sequences", refresh=False)

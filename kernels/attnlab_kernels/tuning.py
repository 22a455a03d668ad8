"""Whether the triton backend times a few tile sizes at the first call of each kind. Off unless asked for."""

from __future__ import annotations

import os
from types import TracebackType

VARIABLE = "ATTNLAB_AUTOTUNE"

_setting: bool | None = None


class _Restore:
    """Puts the former setting back at the end of a `with` block."""

    def __init__(self, former: bool | None) -> None:
        self._former = former

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _setting
        _setting = self._former


def autotune(enabled: bool = True) -> _Restore:
    """Time a few tile sizes at the first call of each kind and use the fastest from then on.

    By default a table decides and the first call compiles only what it runs. Tuning costs seconds for each new
    combination of chip, shapes (to a factor of two), options and statistics; choices last as long as the process.
    Other tiles sum in another order, so results may differ in the last digits between processes.

    The environment variable ATTNLAB_AUTOTUNE=1 does the same where the code says nothing.

    Args:
        enabled: False turns tuning off again.

    Returns:
        A context manager that puts the former setting back; without `with`, the setting stays.

    Example:
        >>> with autotune():
        ...     autotune_enabled()
        True
        >>> autotune_enabled()
        False
    """
    global _setting
    former, _setting = _setting, enabled
    return _Restore(former)


def autotune_enabled() -> bool:
    """Whether tile sizes are timed: what `autotune` last said, else the environment variable."""
    return os.environ.get(VARIABLE, "0") not in ("", "0") if _setting is None else _setting

"""The one exception of its own that this package raises."""

from __future__ import annotations


class UnsupportedError(ValueError):
    """A backend was asked for an option or a statistic that it does not have; the message names both.

    Example:
        >>> from attnlab_kernels import UnsupportedError
        >>> issubclass(UnsupportedError, ValueError)
        True
    """

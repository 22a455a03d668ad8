"""Packages that are called like their main function: `attnlab.capture(model)` and `attnlab.capture.Site` both work.

Importing a subpackage binds it as an attribute of its parent, in the place of a function of the same name; so the
package itself answers the call.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Door(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **options)


def answer_calls(package: str) -> None:
    """Makes the package call the function of its own name: `answer_calls(__name__)` in its `__init__`."""
    sys.modules[package].__class__ = _Door

"""The scripts of `data/` are no package: they are imported from their folder, as they are when they are run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture(scope="session")
def script() -> Iterator[Callable[[str], ModuleType]]:
    sys.path.insert(0, str(DATA))
    yield import_module
    sys.path.remove(str(DATA))

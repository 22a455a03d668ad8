"""The texts that come with attnlab: inside the package in a wheel, in the repository's `data/` otherwise."""

from __future__ import annotations

from pathlib import Path

from attnlab.errors import DataError


def shipped_texts() -> Path:
    """The texts that are analysed where no data is given.

    >>> shipped_texts().name
    'sample.jsonl'
    """
    package = Path(__file__).parents[1]
    for root in (package / "_data", package.parent / "data"):
        path = root / "texts" / "sample.jsonl"
        if path.exists():
            return path
    raise DataError("The shipped texts are missing from this installation; give your own data.")

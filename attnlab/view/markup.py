"""Putting data and files of this package into HTML so that nothing in them can become markup."""

from __future__ import annotations

import base64
import json
from functools import cache
from importlib.resources import files

import numpy as np

_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}

POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)
"""Content security policy of every page made here: nothing is loaded, nothing is sent."""


def script_json(value: object) -> str:
    """JSON that is safe inside a `<script>` element: no `<`, `>`, `&`, nor anything beyond ASCII.

    >>> script_json("</script>\\u2028")
    '"\\\\u003c/script\\\\u003e\\\\u2028"'
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character, escape in _UNSAFE.items():
        text = text.replace(character, escape)
    return text


def base64_of(values: np.ndarray) -> str:
    """The bytes of an array, little-endian, in base64.

    >>> base64_of(np.array([1, 2], dtype=np.uint8))
    'AQI='
    """
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    return base64.b64encode(np.ascontiguousarray(little).tobytes()).decode("ascii")


@cache
def asset(package: str, name: str) -> str:
    """The text of a file that ships in a package."""
    return (files(package) / name).read_text(encoding="utf-8")

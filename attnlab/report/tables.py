"""A data frame as an HTML table: every value escaped, numbers aligned, sortable by a click on a heading."""

from __future__ import annotations

import html
import math
import numbers

import pandas as pd

from attnlab.view.tokens import readable

MOST_ROWS = 100


def table_html(frame: pd.DataFrame, *, most: int = MOST_ROWS) -> str:
    """The first rows of a frame as a table.

    >>> "&lt;b&gt;" in table_html(pd.DataFrame({"token": ["<b>"]}))
    True
    """
    shown = frame.head(most)
    numeric = [pd.api.types.is_numeric_dtype(frame[c]) and frame[c].dtype != bool for c in frame.columns]
    heads = "".join(
        f'<th scope="col"{_kind(is_number)}><button type="button">{html.escape(_title(column))}</button></th>'
        for column, is_number in zip(frame.columns, numeric, strict=True)
    )
    rows = "".join(
        "<tr>" + "".join(_cell(v, is_number) for v, is_number in zip(row, numeric, strict=True)) + "</tr>"
        for row in shown.itertuples(index=False, name=None)
    )
    left = f'<p class="hint">The first {len(shown):,} of {len(frame):,} rows.</p>' if len(frame) > len(shown) else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="table"><table class="sortable"><thead><tr>{heads}'
        f"</tr></thead><tbody>{rows}</tbody></table></div>{left}"
    )


def _title(column: object) -> str:
    return str(column).replace("_", " ")


def _kind(is_number: bool) -> str:
    return ' class="number"' if is_number else ""


def _cell(value: object, is_number: bool) -> str:
    if is_number and isinstance(value, numbers.Real):
        exact = float(value)
        return f'<td class="number" data-v="{exact!r}">{html.escape(number_text(value))}</td>'
    text = ("yes" if value else "no") if isinstance(value, bool) else readable(str(value))
    return f"<td>{html.escape(text)}</td>"


def number_text(value: numbers.Real) -> str:
    """A number in at most five digits, integers in full.

    >>> number_text(12345), number_text(0.123456), number_text(float("nan"))
    ('12,345', '0.1235', '–')
    """
    if isinstance(value, numbers.Integral):
        return f"{int(value):,}"
    number = float(value)
    if not math.isfinite(number):
        return "–" if math.isnan(number) else str(number)
    return f"{number:.4g}"

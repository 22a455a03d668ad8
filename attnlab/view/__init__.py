"""One head on one text: tokens coloured by what a chosen token attends to, in a notebook or a report."""

from attnlab.door import answer_calls
from attnlab.view.reading import view
from attnlab.view.text_view import KindView, TextView

__all__ = ["KindView", "TextView", "view"]

answer_calls(__name__)

"""Reading the attention of a model while it runs."""

from attnlab.capture.call import Call, Head, Kind, Site
from attnlab.capture.session import Session, capture
from attnlab.door import answer_calls

__all__ = ["Call", "Head", "Kind", "Session", "Site", "capture"]

answer_calls(__name__)

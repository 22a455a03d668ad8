"""What analyses find: named arrays, tidy rows, plain sentences, and how they are kept on disk."""

from attnlab.results.metric import Metric
from attnlab.results.result import HEADS_COLUMNS, NamedArray, Result, combine_heads, heads_frame
from attnlab.results.storage import result_files

__all__ = ["HEADS_COLUMNS", "Metric", "NamedArray", "Result", "combine_heads", "heads_frame", "result_files"]

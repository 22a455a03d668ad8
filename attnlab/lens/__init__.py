"""Models of TransformerLens: `capture` reads them through this package, and names translate both ways."""

from attnlab.lens.names import Activation, hook_name, read_hook_name

__all__ = ["Activation", "hook_name", "read_hook_name"]

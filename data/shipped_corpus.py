"""The text that the shipped model learns from: what every Python carries about itself.

Two kinds of documents, read without importing anything but `pydoc_data.topics`: the topics of `help()`, and for each
module of the standard library its docstrings under their signatures, laid out as `pydoc` prints them. Whole documents
are held out by a hash of their name, so the split does not depend on what else a Python version ships.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LEFT_OUT = frozenset(
    {"site-packages", "test", "tests", "idle_test", "lib2to3", "turtledemo", "encodings", "__pycache__"}
    | {"asyncore.py", "asynchat.py", "turtle.py"}
)
"""What is tests, demonstrations, boilerplate, somebody else's packages, or comes under a licence of its own."""

HELD_OUT_SHARE = 0.08
LONGEST_SIGNATURE = 160
SHORTEST_DOCUMENT = 200


class Document(NamedTuple):
    """One document: where it comes from and what it says."""

    source: str
    text: str


class Split(NamedTuple):
    """Documents to learn from and documents never learned from."""

    train: list[Document]
    held_out: list[Document]


def topics() -> list[Document]:
    """Return the topics of `help()`, sorted by name: chapters of the language reference as plain text.

    Example:
        >>> next(d.source for d in topics())
        'topics/assert'
    """
    from pydoc_data.topics import topics as texts

    return [Document(f"topics/{name}", text.strip()) for name, text in sorted(texts.items())]


def _entries(scope: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
    for node in scope.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        name = prefix + node.name
        if text := ast.get_docstring(node):
            if isinstance(node, ast.ClassDef):
                bases = ", ".join(ast.unparse(base) for base in node.bases)
                head = f"class {name}({bases})" if bases else f"class {name}"
            else:
                head = f"{name}({ast.unparse(node.args)})"
            body = "\n".join(f"    {line}".rstrip() for line in text.splitlines())
            yield f"{head[:LONGEST_SIGNATURE]}\n{body}"
        if isinstance(node, ast.ClassDef):
            yield from _entries(node, f"{name}.")


def module_text(source: str, name: str) -> str:
    r"""Return the docstrings of a module's source under their signatures; empty where it has none.

    Example:
        >>> print(module_text('\"\"\"Say hello.\"\"\"\ndef hello(to="you"):\n    "Print a greeting."', "greet"))
        greet
        <BLANKLINE>
        Say hello.
        <BLANKLINE>
        hello(to='you')
            Print a greeting.
    """
    tree = ast.parse(source)
    parts = list(_entries(tree, ""))
    if text := ast.get_docstring(tree):
        parts.insert(0, inspect.cleandoc(text))
    return "\n\n".join([name, *parts]) if parts else ""


def modules() -> list[Document]:
    """Return one document for each source file of the standard library that has docstrings, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        relative = path.relative_to(root)
        if LEFT_OUT.intersection(relative.parts):
            continue
        name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        text = module_text(path.read_text(encoding="utf-8"), name)
        if len(text) >= SHORTEST_DOCUMENT:
            documents.append(Document(f"stdlib/{relative.as_posix()}", text))
    return documents


def is_held_out(source: str) -> bool:
    """Say whether the document of this name is kept from training: a fixed pseudo-random share of all names."""
    return int.from_bytes(hashlib.sha256(source.encode()).digest()[:4]) < HELD_OUT_SHARE * 2**32


def split(documents: list[Document]) -> Split:
    """Split documents in two, and drop from those held out every paragraph that also stands in the others.

    Modules repeat each other's docstrings (`_pyio` those of `io`), which would make the held-out loss look too good.

    Example:
        >>> parts = split([Document("topics/if", "A. " * 70), Document("topics/types", "B. " * 70)])
        >>> [document.source for document in parts.held_out]
        ['topics/types']
    """
    train = [document for document in documents if not is_held_out(document.source)]
    seen = {" ".join(paragraph.split()) for document in train for paragraph in document.text.split("\n\n")}
    held_out = []
    for document in documents:
        if is_held_out(document.source):
            kept = [part for part in document.text.split("\n\n") if " ".join(part.split()) not in seen]
            if len(text := "\n\n".join(kept)) >= SHORTEST_DOCUMENT:
                held_out.append(Document(document.source, text))
    return Split(train, held_out)


def corpus() -> Split:
    """Return everything this Python carries, split in documents to learn from and documents held out."""
    return split(topics() + modules())

"""Write the texts that ship with attnlab, all of them from documents that the shipped model never learned from.

    python data/make_shipped_texts.py --tokenizer data/models/pydoc-4l --out data/texts

`heldout.jsonl` is every document held out, for the loss on the model's card. `sample.jsonl` is what `attnlab analyze`
reads when no data is named: passages of documentation between 100 and 400 tokens long, some with a paragraph twice.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from shipped_corpus import Document, corpus
from transformers import AutoTokenizer, PreTrainedTokenizerBase

SHORTEST, LONGEST = 100, 400
PASSAGES, REPEATED = 48, 8
PER_DOCUMENT = 10


def passages(document: Document, tokenizer: PreTrainedTokenizerBase, target: int) -> Iterator[Document]:
    """Cut a document at its paragraphs into passages of about `target` tokens; leave out those over the bound."""
    held: list[str] = []
    for paragraph in document.text.split("\n\n"):
        held.append(paragraph)
        text = "\n\n".join(held)
        size = len(tokenizer(text)["input_ids"])
        if size >= target:
            if size <= LONGEST:
                yield Document(document.source, text)
            held.clear()


def with_repeat(passage: Document, tokenizer: PreTrainedTokenizerBase) -> Document | None:
    """Return the passage with its first long paragraph again at its end, None where that does not fit."""
    paragraphs = passage.text.split("\n\n")
    long = next((p for p in paragraphs[:-1] if len(tokenizer(p)["input_ids"]) >= 40), None)
    if long is None:
        return None
    text = "\n\n".join([*paragraphs, long])
    return (
        Document(f"{passage.source} (a paragraph twice)", text)
        if len(tokenizer(text)["input_ids"]) <= LONGEST
        else None
    )


def sample(documents: list[Document], tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> list[Document]:
    """Choose the passages to analyse: no document gives more than a few, and the order is that of the documents."""
    rng = np.random.default_rng(seed)
    candidates: list[Document] = []
    for document in documents:
        found = list(passages(document, tokenizer, int(rng.integers(SHORTEST, 300))))
        kept = sorted(rng.permutation(len(found))[:PER_DOCUMENT])
        candidates += [found[i] for i in kept]
    order = rng.permutation(len(candidates))
    plain = [candidates[i] for i in sorted(order[:PASSAGES])]
    doubled = [twice for i in order[PASSAGES:] if (twice := with_repeat(candidates[i], tokenizer))]
    return plain + doubled[:REPEATED]


def write(path: Path, documents: list[Document]) -> None:
    """Write documents as JSON lines with `text` and `source`."""
    lines = [
        json.dumps({"text": document.text, "source": document.source}, ensure_ascii=False) for document in documents
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Write both files and say what they hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="the model's folder")
    parser.add_argument("--out", type=Path, required=True, help="where the two files go")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    held_out = corpus().held_out
    chosen = sample(held_out, tokenizer)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write(arguments.out / "heldout.jsonl", held_out)
    write(arguments.out / "sample.jsonl", chosen)
    sizes = [len(tokenizer(document.text)["input_ids"]) for document in chosen]
    print(f"{len(held_out)} documents held out, {len(chosen)} passages of {min(sizes)} to {max(sizes)} tokens")


if __name__ == "__main__":
    main()

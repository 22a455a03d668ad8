"""Print every figure that a shipped model's card states, from the weights in its folder.

    python data/evaluate_shipped_model.py data/models/pydoc-4l

The table goes into the card as it is; the tests compute it again and compare.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from shipped_measures import SINK_THRESHOLD, head_scores, repeat_loss, text_loss
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = Path(__file__).parent / "texts"
PERIODS = (64, 255)
SCORED_PERIOD = 128
SHOWN = 4


def texts_of(path: Path) -> list[str]:
    """Return the texts of a file of JSON lines."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def best(scores: Tensor, count: int = SHOWN) -> dict[str, float]:
    """Return the heads with the largest scores [layers, heads], by name.

    Example:
        >>> best(torch.tensor([[0.0, 0.5], [0.25, 0.0]]), 2)
        {'L0H1': 0.5, 'L1H0': 0.25}
    """
    values, places = scores.flatten().topk(count)
    width = scores.shape[1]
    pairs = zip(places.tolist(), values.tolist(), strict=True)
    return {f"L{place // width}H{place % width}": value for place, value in pairs}


def figures(folder: Path) -> dict[str, float]:
    """Measure the model in a folder: held-out loss, copying of random tokens, and its strongest heads of each kind."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held_out = text_loss(model, tokenizer, texts_of(TEXTS / "heldout.jsonl"), model.config.max_position_embeddings)
    found = {
        "held-out text, nats per token": held_out.nats_per_token,
        "held-out text, bits per byte": held_out.bits_per_byte,
    }
    for period in PERIODS:
        pair = repeat_loss(model, tokenizer, period)
        found[f"{period} random tokens, nats per token"] = pair.first
        found[f"the same {period} tokens again, nats per token"] = pair.second
    model.set_attn_implementation("eager")
    scores = head_scores(model, tokenizer, texts_of(TEXTS / "sample.jsonl"), SCORED_PERIOD)
    for name, table in scores._asdict().items():
        found |= {f"{name} {head}": value for head, value in best(table).items()}
    found[f"heads of {scores.sink_mass.numel()} with sink_mass over {SINK_THRESHOLD}"] = float(
        (scores.sink_mass > SINK_THRESHOLD).sum()
    )
    return found


def main() -> None:
    """Print the figures as a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the model's folder")
    print("| measure | value |\n|---|---|")
    for name, value in figures(parser.parse_args().model).items():
        print(f"| {name} | {value:.3f} |")


if __name__ == "__main__":
    main()

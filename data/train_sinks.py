"""Train the two small decoders that show where attention sinks come from: one with a softmax, one with a sigmoid.

    python data/train_sinks.py --normalizer softmax --out data/models/sinks-softmax --work build/models/sinks-softmax
    python data/train_sinks.py --normalizer sigmoid --out data/models/sinks-sigmoid --work build/models/sinks-sigmoid

Both begin with the same weights and read the same batches in the same order; only A = softmax(S) is A = sigmoid(S + b),
b = -ln T, in the second (arXiv 2409.04431). Gu et al. (arXiv 2410.10781) trained such pairs of 60 million parameters
and found sinks under the softmax alone. The text and the sequences that teach copying are those of `shipped_corpus` and
`shipped_batches`; with text alone sinks came later. The sink metric is measured along the way on text that is not
trained on, and written into `curve.json`; the model is kept at three steps.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from first_weights import draw_for_width
from shipped_batches import Source, Stage, stream_of
from shipped_corpus import Split, corpus
from shipped_tokenizers import special_ids, train_tokenizer
from shipped_writing import write_model
from training import Progress, descend, learning_rate, load_checkpoint, new_optimizers, save_checkpoint
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from attnlab.models import sigmoid
from attnlab.verify import write_figures
from attnlab.verify.sinks import CHECKPOINTS, KINDS, LENGTH, Inputs, held_out_texts, inputs, sinks_of

VOCABULARY, ROWS, STEPS = 512, 64, 1500
MUON_PEAK, ADAMW_PEAK = 1e-2, 3e-3
SHARES = {"echo": 0.1, "recall": 0.2, "random_repeats": 0.1, "text_repeats": 0.1}
KEPT = (200,)
MEASURED = (25, 50, 100, *range(200, STEPS + 1, 100))
SAVE_EVERY = 50
CURVE_FILE = "curve.json"

Normalizer = Literal["softmax", "sigmoid"]


def new_model(tokenizer: PreTrainedTokenizerFast, normalizer: Normalizer, seed: int) -> LlamaForCausalLM:
    """Return the model with random weights, the same for both normalisers."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        **special_ids(tokenizer),
        attnlab_normalizer=normalizer,
    )
    if normalizer == "sigmoid":
        config.attnlab_sigmoid_bias = -math.log(LENGTH)
    sigmoid.prepare(config, f"sinks-{normalizer}")
    model = LlamaForCausalLM(config)
    draw_for_width(model, ("embed", "q_proj", "k_proj"))
    return model


def write_point(folder: Path, model: LlamaForCausalLM) -> None:
    """Write a copy of the model as it is now, with a configuration that asks for its own attention."""
    stored = LlamaForCausalLM(model.config)
    stored.load_state_dict(model.state_dict())
    write_model(folder, stored)
    if model.config.attnlab_normalizer == "sigmoid":
        path = folder / "config.json"
        stated = json.loads(path.read_text(encoding="utf-8")) | {"attn_implementation": sigmoid.NAME}
        path.write_text(json.dumps(stated, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "generation_config.json").unlink(missing_ok=True)


class Corpus(NamedTuple):
    """The tokenizer, the stream of tokens to learn from, and what to measure on."""

    tokenizer: PreTrainedTokenizerFast
    stream: np.ndarray
    unseen: Inputs


def encoded(texts: Split) -> Corpus:
    """Train the tokenizer on the documents to learn from, and encode them; the texts that ship were held out."""
    learned = [document.text for document in texts.train]
    tokenizer = train_tokenizer(learned, VOCABULARY, LENGTH)
    return Corpus(tokenizer, stream_of(learned, tokenizer), inputs(tokenizer, held_out_texts()))


def train(
    normalizer: Normalizer, corpus: Corpus, work: Path, seed: int, steps: int = STEPS, stop: int | None = None
) -> LlamaForCausalLM:
    """Go on from where `work` has come to, to the end or to the step `stop`; what is measured and kept stands there."""
    model = new_model(corpus.tokenizer, normalizer, seed)
    optimizers = new_optimizers(model)
    done = load_checkpoint(work, model, optimizers)
    source = Source(corpus.stream, VOCABULARY, corpus.tokenizer.bos_token_id, seed)
    stage = Stage(steps, ROWS, LENGTH, **SHARES)
    work.mkdir(parents=True, exist_ok=True)
    curve = [point for point in read_curve(work) if point["step"] <= done.step]
    began, end = time.monotonic() - done.seconds, steps if stop is None else stop
    for step in range(done.step, end):
        batch = source.batch(stage, step)
        loss = model(input_ids=batch.ids, labels=batch.labels, use_cache=False).loss
        rate = learning_rate(step, steps)
        descend(loss, model, optimizers, (rate * MUON_PEAK, rate * ADAMW_PEAK))
        if step + 1 in KEPT:
            write_point(work / CHECKPOINTS / f"step-{step + 1}", model)
        if step + 1 in MEASURED or step + 1 == steps:
            found = sinks_of(model, corpus.unseen)
            curve.append({"step": step + 1} | {name: round(value, 5) for name, value in found.items()})
            rates = ", ".join(f"{found[f'sink rate, {kind}']:.3f}" for kind in KINDS)
            print(
                f"step {step + 1} of {steps}, {time.monotonic() - began:.0f} s, loss {loss.item():.3f}, "
                f"held out {found['held-out loss']:.3f}, sink rates {rates}",
                flush=True,
            )
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == end:
            points = ",\n ".join(json.dumps(point) for point in curve)
            (work / CURVE_FILE).write_text(f"[{points}]\n", encoding="utf-8")
            save_checkpoint(work, model, optimizers, Progress(step + 1, time.monotonic() - began))
    return model


def read_curve(folder: Path) -> list[dict[str, float]]:
    """Return the points measured so far: the step, the held-out loss and the sink metric."""
    path = folder / CURVE_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def main() -> None:
    """Train, measure along the way, and write the model's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--normalizer", choices=("softmax", "sigmoid"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="the model's folder, such as data/models/sinks-softmax")
    parser.add_argument("--work", type=Path, help="what a later start goes on from [build/models/sinks-<normalizer>]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    work = arguments.work or Path("build/models") / f"sinks-{arguments.normalizer}"
    torch.set_num_threads(arguments.threads)

    texts = encoded(corpus())
    tokenizer = texts.tokenizer
    print(f"{len(texts.stream)} tokens to learn from", flush=True)
    model = train(arguments.normalizer, texts, work, arguments.seed)
    write_point(arguments.out, model)
    GenerationConfig(**special_ids(tokenizer)).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    shutil.copytree(work / CHECKPOINTS, arguments.out / CHECKPOINTS, dirs_exist_ok=True)
    shutil.copyfile(work / CURVE_FILE, arguments.out / CURVE_FILE)
    write_figures(f"sinks-{arguments.normalizer}", arguments.out)
    shutil.rmtree(work)
    print(f"Written to {arguments.out}")


if __name__ == "__main__":
    main()

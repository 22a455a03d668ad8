"""Train the small language model that ships with attnlab, from scratch, on two CPU cores.

    python data/train_pydoc_4l.py --out data/models/pydoc-4l --work build/models/pydoc-4l

The text is what every Python carries (`shipped_corpus`), mixed with sequences that teach copying from context
(`shipped_batches`), so induction heads (Olsson et al. 2022, https://arxiv.org/abs/2209.11895) form within minutes.
Every step draws its batch from a generator seeded with the step's number, so a run that was stopped goes on from its
checkpoint as if it had not been.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from first_weights import draw_for_width
from shipped_batches import STAGES, Source, stream_of
from shipped_corpus import corpus
from shipped_tokenizers import special_ids, train_tokenizer
from shipped_writing import write_model
from training import Progress, descend, learning_rate, load_checkpoint, new_optimizers, save_checkpoint
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from attnlab.verify import write_figures
from attnlab.verify.language import repeat_loss, text_loss

CONTEXT = 512
VOCABULARY = 2048
MUON_PEAK, ADAMW_PEAK = 5e-3, 1e-3
SAVE_EVERY = 200


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return the model with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        **special_ids(tokenizer),
    )
    model = LlamaForCausalLM(config)
    draw_for_width(model, ("embed", "q_proj", "k_proj"))
    return model


def main() -> None:
    """Train, say how it goes, and write the model's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the model's folder, such as data/models/pydoc-4l")
    parser.add_argument("--work", type=Path, required=True, help="where to keep what a later start goes on from")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    texts = corpus()
    tokenizer = train_tokenizer([document.text for document in texts.train], VOCABULARY, CONTEXT)
    order = np.random.default_rng(arguments.seed).permutation(len(texts.train))
    stream = stream_of([texts.train[i].text for i in order], tokenizer)
    held_out = [document.text for document in texts.held_out][-8:]
    print(
        f"Python {platform.python_version()}: {len(texts.train)} documents, {len(stream)} tokens to learn from",
        flush=True,
    )

    model = new_model(tokenizer, arguments.seed)
    optimizers = new_optimizers(model)
    done = load_checkpoint(arguments.work, model, optimizers)
    source = Source(stream, VOCABULARY, tokenizer.bos_token_id, arguments.seed)
    schedule = [stage for stage in STAGES for _ in range(stage.steps)]
    began = time.monotonic() - done.seconds
    recent: list[float] = []
    for step in range(done.step, len(schedule)):
        batch = source.batch(schedule[step], step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch.ids, labels=batch.labels, use_cache=False).loss
        rate = learning_rate(step, len(schedule))
        descend(loss, model, optimizers, (rate * MUON_PEAK, rate * ADAMW_PEAK))
        recent.append(loss.item())
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == len(schedule):
            seconds = time.monotonic() - began
            save_checkpoint(arguments.work, model, optimizers, Progress(step + 1, seconds))
            unseen = text_loss(model, tokenizer, held_out, CONTEXT)
            copied = [repeat_loss(model, tokenizer, period) for period in (32, 128)]
            print(
                f"step {step + 1} of {len(schedule)}, {seconds:.0f} s, loss {np.mean(recent):.3f}, "
                f"held out {unseen.nats_per_token:.3f}, random "
                + ", ".join(f"{pair.first:.2f} -> {pair.second:.2f}" for pair in copied),
                flush=True,
            )
            recent.clear()

    model.generation_config = GenerationConfig(**special_ids(tokenizer))
    write_model(arguments.out, model, tokenizer)
    write_figures("pydoc-4l", arguments.out)
    shutil.rmtree(arguments.work)
    print(f"Trained in {time.monotonic() - began:.0f} s; written to {arguments.out}")


if __name__ == "__main__":
    main()

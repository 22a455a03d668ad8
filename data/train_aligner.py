"""Train the small encoder-decoder that ships with attnlab, on a made-up translation task, on a CPU.

    python data/train_aligner.py --out data/models/aligner --work build/models/aligner

The sentences are those of `attnlab.tasks.translation`: combinations of words and orders of phrases that are held out
are in none that is learned from. It learns to translate, and nothing tells it where to look. The number of steps is
fixed beforehand. Every step draws its batch from a generator seeded with the step's number, so a run that was stopped
goes on from its checkpoint as if it had not been.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from shipped_tokenizers import special_ids, wrapped
from shipped_writing import write_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from training import Progress, descend, learning_rate, load_checkpoint, new_optimizers, save_checkpoint
from transformers import GenerationConfig, MarianConfig, MarianMTModel, PreTrainedTokenizerFast

from attnlab.tasks.grammar import vocabulary
from attnlab.tasks.translation import Translations, in_token_ids, sentence_pairs
from attnlab.verify import write_figures

SENTENCES, BATCH, STEPS = 20_000, 64, 1600
MUON_PEAK, ADAMW_PEAK = 1e-2, 3e-3
LENGTH = 32
SAVE_EVERY = 50


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of the grammar: a token a word, of both languages, and `</s>` at the end."""
    special = {"</s>": 0, "<unk>": 1, "<pad>": 2}
    entries = special | {word: len(special) + number for number, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(entries, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    return wrapped(tokenizer, LENGTH)


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> MarianMTModel:
    """Return the model with random weights."""
    torch.manual_seed(seed)
    width = 48
    ids = special_ids(tokenizer)
    config = MarianConfig(
        vocab_size=len(tokenizer),
        d_model=width,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=LENGTH,
        dropout=0.0,
        init_std=width**-0.5,
        scale_embedding=True,
        decoder_start_token_id=tokenizer.pad_token_id,
        forced_eos_token_id=None,
        **ids,
    )
    model = MarianMTModel(config)
    model.generation_config = GenerationConfig(
        decoder_start_token_id=tokenizer.pad_token_id, max_length=LENGTH, num_beams=1, do_sample=False, **ids
    )
    return model


def learned_from(tokenizer: PreTrainedTokenizerFast, seed: int, count: int = SENTENCES) -> Translations:
    """Return the sentences to learn from: training's combinations of words in training's orders of phrases."""
    pairs = sentence_pairs(count, seed=seed, words="train", templates="train")
    return in_token_ids(tokenizer, pairs)


def loss_of(model: MarianMTModel, data: Translations, chosen: Tensor) -> Tensor:
    """Return the mean loss of the chosen sentences in nats per token."""
    arguments = {name: part[chosen] for name, part in (*data.inputs.items(), ("labels", data.labels))}
    return model(**arguments, use_cache=False).loss


def train(data: Translations, model: MarianMTModel, work: Path, seed: int, steps: int, stop: int | None = None) -> None:
    """Go on from where `work` has come to, to the end or to the step `stop`, and keep a checkpoint there."""
    optimizers = new_optimizers(model)
    done = load_checkpoint(work, model, optimizers)
    began, end = time.monotonic() - done.seconds, steps if stop is None else stop
    model.train()
    recent: list[float] = []
    for step in range(done.step, end):
        drawn = np.random.default_rng([seed, step]).integers(len(data), size=BATCH)
        loss = loss_of(model, data, torch.from_numpy(drawn))
        rate = learning_rate(step, steps)
        descend(loss, model, optimizers, (rate * MUON_PEAK, rate * ADAMW_PEAK))
        recent.append(loss.item())
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == end:
            seconds = time.monotonic() - began
            save_checkpoint(work, model, optimizers, Progress(step + 1, seconds))
            print(f"step {step + 1} of {steps}, {seconds:.0f} s, loss {np.mean(recent):.4f}", flush=True)
            recent.clear()
    model.eval()


def main() -> None:
    """Train, say how it goes, and write the model's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the model's folder, such as data/models/aligner")
    parser.add_argument("--work", type=Path, default=Path("build/models/aligner"), help="where to go on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    tokenizer = new_tokenizer()
    model = new_model(tokenizer, arguments.seed)
    train(learned_from(tokenizer, arguments.seed), model, arguments.work, arguments.seed, STEPS)
    write_model(arguments.out, model, tokenizer)
    write_figures("aligner", arguments.out)
    shutil.rmtree(arguments.work)
    print(f"Written to {arguments.out}")


if __name__ == "__main__":
    main()

"""Train `tasks`, the small language model that solves the literature's tasks, from scratch, on two CPU cores.

    python data/train_tasks.py --out data/models/tasks --work build/models/tasks

It learns from the tasks' prompts, plain sentences and the text that every Python carries (`tasks_batches`). Words and
templates that are held out are in no prompt that it learns from. Every step draws its batch from a generator seeded
with the step's number, so a run that was stopped goes on from its checkpoint as if it had not been. At the end its
truth is measured (`measure_tasks_truth`), and its figures.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from first_weights import draw_for_width, look_for_the_like
from measure_tasks_truth import write_truth
from shipped_batches import Stage, stream_of
from shipped_corpus import corpus
from shipped_tokenizers import special_ids
from shipped_writing import write_model
from tasks_batches import LENGTH, Mixture, Part
from tasks_words import new_tokenizer
from training import Progress, descend, learning_rate, load_checkpoint, new_optimizers, save_checkpoint
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from attnlab.tasks import TASKS, score
from attnlab.verify import write_figures
from attnlab.verify.language import repeat_loss

CONTEXT = 256
VOCABULARY = 1700
COPY = Stage(steps=600, rows=48, length=LENGTH // 4, echo=0.40, recall=0.50, random_repeats=0.10, text_repeats=0.0)
MIRROR = Stage(steps=300, rows=20, length=LENGTH // 4, echo=0.40, recall=0.50, random_repeats=0.10, text_repeats=0.0)
LOOK = MIRROR._replace(steps=500)
TASK = Stage(steps=1200, rows=5, length=LENGTH, echo=0.10, recall=0.20, random_repeats=0.25, text_repeats=0.10)
SCHEDULE = (
    Part(COPY),
    Part(MIRROR, lookup_rows=7, mirrored=1.0),
    Part(LOOK, lookup_rows=7, mirrored=0.3, before=0.4),
    Part(TASK, task_rows=13, lookup_rows=2, mirrored=0.2, before=0.5),
    Part(TASK._replace(steps=1600), task_rows=13, lookup_rows=2, mirrored=0.2, before=0.5, slow=2, sentences=0.35),
    Part(TASK._replace(steps=600), task_rows=15, lookup_rows=1, mirrored=0.2, before=0.5, slow=3, sentences=0.5),
)
"""The parts, in order: every one builds on what formed before."""
FALLS = ((2600, 3300, 0.35), (4200, 4200, 0.6), (4800, 4800, 0.6))
"""Three falls of the rate: until which step, and the length and the level share of the fall that it follows till then.

The first fall was too early for agreement, so at step 2600 the rate begins near its peak again. The last part, with
more plain sentences, is for words that are in no prompt of training: some plurals were known too little.
"""
MUON_PEAK, ADAMW_PEAK = 5e-3, 1e-3
SAVE_EVERY, SCORE_EVERY = 100, 300
SCORED = 100


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return the model with random weights.

    With heads that look for the like from the first step on, and short sequences first, recall formed within 500 steps;
    without either it had not formed in 700.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=224,
        head_dim=32,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        **special_ids(tokenizer),
    )
    model = LlamaForCausalLM(config)
    draw_for_width(model, ("embed", "q_proj", "v_proj"))
    look_for_the_like(model.model.layers)
    return model


def rate(step: int) -> float:
    """The learning rate of a step, as a share of its peak."""
    _, steps, level_until = next(fall for fall in FALLS if step < fall[0])
    return learning_rate(step, steps, level_until)


def accuracies(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> dict[str, list[float]]:
    """Of each task: the accuracy on training words and templates, on held-out words, on held-out templates."""
    model.eval()
    found = {}
    for name, make in TASKS.items():
        parts = (("train", "train"), ("held_out", "train"), ("train", "held_out"))
        several = (make(tokenizer, SCORED, seed=seed, words=words, templates=of) for words, of in parts)
        found[name] = [score(model, prompts).accuracy for prompts in several]
    model.train()
    return found


def main() -> None:
    """Train, say how it goes, and write the model's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the model's folder, such as data/models/tasks")
    parser.add_argument("--work", type=Path, required=True, help="where the checkpoint is kept while it trains")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop-at", type=int, help="a step to stop at; a later start goes on from there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    texts = [document.text for document in corpus().train]
    tokenizer = new_tokenizer(texts, VOCABULARY, CONTEXT)
    order = np.random.default_rng(arguments.seed).permutation(len(texts))
    stream = stream_of([texts[i] for i in order], tokenizer)
    unknown = float((stream == tokenizer.unk_token_id).mean())
    print(f"{len(texts)} documents, {len(stream)} tokens, of them {unknown:.1%} unknown words", flush=True)

    model = new_model(tokenizer, arguments.seed)
    optimizers = new_optimizers(model)
    done = load_checkpoint(arguments.work, model, optimizers)
    mixture = Mixture(stream, tokenizer, arguments.seed)
    schedule = [part for part in SCHEDULE for _ in range(part.stage.steps)]
    last = min(arguments.stop_at or len(schedule), len(schedule))
    began = time.monotonic() - done.seconds
    recent: list[float] = []
    for step in range(done.step, last):
        batch = mixture.batch(schedule[step], step)
        logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        loss = batch.loss(logits)
        share = rate(step)
        descend(loss, model, optimizers, (share * MUON_PEAK, share * ADAMW_PEAK))
        recent.append(loss.item())
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == last:
            seconds = time.monotonic() - began
            save_checkpoint(arguments.work, model, optimizers, Progress(step + 1, seconds))
            copied = repeat_loss(model, tokenizer, period=24).second
            print(
                f"step {step + 1} of {len(schedule)}, {seconds:.0f} s, loss {np.mean(recent):.3f}, "
                f"random tokens again {copied:.2f}",
                flush=True,
            )
            recent.clear()
        if ((step + 1) % SCORE_EVERY == 0 and schedule[step].task_rows) or step + 1 == last:
            for name, shares in accuracies(model, tokenizer, seed=step + 1).items():
                print(f"    {name}: " + ", ".join(f"{share:.2f}" for share in shares), flush=True)
    if last < len(schedule):
        return
    model.generation_config = GenerationConfig(**special_ids(tokenizer))
    write_model(arguments.out, model, tokenizer)
    print(f"Trained in {time.monotonic() - began:.0f} s; written to {arguments.out}", flush=True)
    write_truth(arguments.out)
    write_figures("tasks", arguments.out)


if __name__ == "__main__":
    main()

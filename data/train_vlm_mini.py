"""Train `vlm-mini`, the small vision-language model that ships with attnlab, from scratch, on one CPU core.

    pip install 'attnlab[models]'
    python data/train_vlm_mini.py --out data/models/vlm-mini --work build/models/vlm-mini

A LLaVA (https://arxiv.org/abs/2304.08485): a CLIP vision tower, a projector, a Llama that reads the image's tokens
before the words. It answers questions about grids of scikit-learn's digits (`attnlab.tasks.digit_grid`); the images
that are held out from `digits-vit` are held out from it too. The vision tower learns first and alone, then all of it,
so that the words' model finds digits in the image tokens from its first step on. Every step draws its pictures from a
generator seeded with the step's number, so a run that was stopped goes on from its checkpoint as if it had not been.
The number of steps is fixed beforehand: the held-out images decide nothing.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from first_weights import WRITTEN, look_for_the_like
from shipped_tokenizers import special_ids, wrapped
from shipped_writing import write_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, pad, rms_norm
from training import WARM_UP, Progress, descend, learning_rate, load_checkpoint, new_optimizers, save_checkpoint
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from attnlab.tasks.digit_grid import (
    BLANK,
    CELL,
    CELLS,
    DIGITS,
    PATCH,
    QUESTIONS,
    SIDE,
    DigitGrids,
    digit_grids,
    digit_images,
)
from attnlab.verify import write_figures
from attnlab.verify.digits_vit import DARKEST, HeldOut

CONTEXT = 64
SEEING, STEPS, BATCH = 800, 3200, 64
"""Steps in which the vision tower learns alone, all steps, pictures of one."""
SEEING_PEAKS, ANSWERING_PEAKS = (5e-3, 2e-3), (1e-3, 1e-3)
"""Learning rates of Muon and AdamW; at the first ones the words' model loses the look-ups that it begins with."""
TURN, SIZE, SHIFT = math.radians(12), 0.12, 1.0
"""Largest turn, logarithm of a stretch, and shift in pixels of an image that is learned from."""
NAMED, BESIDE = 0.3, 0.5
"""Weights of the cells' names beside their digits, and of both beside the answers."""
SAVE_EVERY, SCORED = 200, 500
SPECIAL = ("<s>", "</s>", "<pad>", "<unk>", "<image>")


def new_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the task's words and signs, parted at spaces; sequences begin with `<s>`."""
    asked = [word for text in QUESTIONS.values() for word in text.replace("{ASKED}", "").split()]
    known = dict.fromkeys([*SPECIAL, *asked, *DIGITS, *CELLS])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("?", behavior="isolated")]
    )
    return wrapped(tokenizer, CONTEXT, extra_special_tokens={"image_token": "<image>"})


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """Return the model with random weights; heads of the words' model begin by looking for the like."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=144,
        projection_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_channels=1,
        image_size=SIDE * CELL,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        **special_ids(tokenizer),
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.image_token_id,
        image_seq_length=(SIDE * CELL // PATCH) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            read = weight.shape[1]
            torch.nn.init.normal_(weight, std=read**-0.5)
        if "down_proj" in name or "fc2" in name or "out_proj" in name:
            weight.data.mul_(WRITTEN)
    look_for_the_like(model.model.language_model.layers)
    return model


def moved(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Turn, stretch and shift each image [N, 8, 8] a little, by chance; what moves in is 0."""
    turn, size = rng.uniform(-TURN, TURN, len(images)), np.exp(rng.uniform(-SIZE, SIZE, (2, len(images))))
    shift = rng.uniform(-SHIFT, SHIFT, (2, len(images))) * 2 / CELL
    cosine, sine = np.cos(turn), np.sin(turn)
    rows = [[cosine * size[0], -sine * size[0], shift[0]], [sine * size[1], cosine * size[1], shift[1]]]
    places = torch.from_numpy(np.array(rows)).permute(2, 0, 1).float()
    grid = affine_grid(places, [len(images), 1, CELL, CELL], align_corners=False)
    return grid_sample(images.float()[:, None], grid, align_corners=False)[:, 0].clamp(0, DARKEST)


def batch(tokenizer: PreTrainedTokenizerFast, known: HeldOut, seed: int, step: int) -> DigitGrids:
    """Draw the pictures of one step; the same step always gets the same."""
    rng = np.random.default_rng([seed, step, 0])
    images = HeldOut(moved(known.images, rng), known.labels)
    return digit_grids(tokenizer, BATCH, seed=[seed, step, 1], digits=images, blank=rng.random())


def loss_of_cells(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, drawn: DigitGrids, features: Tensor
) -> Tensor:
    """Return what the image tokens [E, 36, D] say of their cells by themselves: each its digit and the cell's name.

    They are asked in the embeddings that the words have, so that a digit in a picture comes to lie near its word.
    """
    first = int(drawn.cell_tokens.min())
    of_cells = features[:, drawn.cell_tokens - first].transpose(1, 2)
    of_cells = rms_norm(of_cells, of_cells.shape[-1:])
    words = [torch.tensor(tokenizer.convert_tokens_to_ids(list(several))) for several in (DIGITS, CELLS)]
    digits, names = (of_cells @ model.lm_head.weight[several].T for several in words)
    contents = drawn.contents[:, None].expand(digits.shape[:3])
    seen = contents != BLANK
    named = cross_entropy(names.flatten(0, 2), torch.arange(len(CELLS)).expand(names.shape[:3]).flatten())
    return cross_entropy(digits[seen], contents[seen]) + NAMED * named


def loss_of_answers(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, drawn: DigitGrids
) -> tuple[Tensor, Tensor]:
    """Return the loss of each answer, and of the end after it, [2 E]; and the image tokens [E, 36, D] on the way."""
    rows, end = torch.arange(len(drawn)), drawn.positions["END"]
    ids = pad(drawn.input_ids, (0, 1))
    ids[rows, end + 1] = drawn.answers
    mask = pad(drawn.attention_mask, (1, 0), value=True)
    found = model.model(input_ids=ids, attention_mask=mask.long(), pixel_values=drawn.pixel_values, use_cache=False)
    hidden = torch.cat([found.last_hidden_state[rows, end], found.last_hidden_state[rows, end + 1]])
    wanted = torch.cat([drawn.answers, torch.full_like(drawn.answers, tokenizer.eos_token_id)])
    each = cross_entropy(model.lm_head(hidden), wanted, reduction="none")
    return each, found.image_hidden_states.unflatten(0, (len(drawn), -1))


def rates(step: int, steps: int) -> tuple[float, ...]:
    """Return the learning rates of Muon and of AdamW: level while the tower learns, then falling.

    Example:
        >>> rates(SEEING - 1, STEPS)
        (0.005, 0.002)
    """
    if step < SEEING:
        return tuple(peak * min(1.0, (step + 1) / WARM_UP) for peak in SEEING_PEAKS)
    return tuple(peak * learning_rate(step - SEEING, steps - SEEING) for peak in ANSWERING_PEAKS)


@torch.no_grad()
def accuracy(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, known: HeldOut) -> list[float]:
    """Return the share of right answers by form, on pictures of digits that were not moved."""
    return [
        float(drawn.solved(model(**drawn.inputs).logits).double().mean())
        for drawn in (digit_grids(tokenizer, SCORED, seed=1, digits=known, form=form) for form in ("digit", "cell"))
    ]


def train(
    tokenizer: PreTrainedTokenizerFast, known: HeldOut, work: Path, seed: int, steps: int, stop: int | None = None
) -> LlavaForConditionalGeneration:
    """Go on from where `work` has come to, to the end or to the step `stop`, and keep a checkpoint there."""
    model = new_model(tokenizer, seed)
    optimizers = new_optimizers(model)
    done = load_checkpoint(work, model, optimizers)
    began = time.monotonic() - done.seconds
    end = steps if stop is None else stop
    recent: list[tuple[float, ...]] = []
    for step in range(done.step, end):
        drawn = batch(tokenizer, known, seed, step)
        if step < SEEING:
            seen = model.get_image_features(drawn.pixel_values).pooler_output
            cells = loss_of_cells(model, tokenizer, drawn, torch.stack(list(seen)))
            loss, parts = cells, (cells.item(),)
        else:
            each, seen = loss_of_answers(model.train(), tokenizer, drawn)
            cells = loss_of_cells(model, tokenizer, drawn, seen)
            loss = each.mean() + BESIDE * cells
            parts = (cells.item(), each[:BATCH:2].mean().item(), each[1:BATCH:2].mean().item())
        descend(loss, model, optimizers, rates(step, steps))
        recent.append(parts)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == end:
            seconds = time.monotonic() - began
            save_checkpoint(work, model, optimizers, Progress(step + 1, seconds))
            shares = accuracy(model.eval(), tokenizer, known)
            means = np.mean([parts for parts in recent if len(parts) == len(recent[-1])], 0)
            lost = ", ".join(f"{of} {x:.3f}" for of, x in zip(("image tokens", "digit", "cell"), means, strict=False))
            print(
                f"step {step + 1} of {steps}, {seconds:.0f} s, loss: {lost}; "
                f"learned: digit {shares[0]:.3f}, cell {shares[1]:.3f}",
                flush=True,
            )
            recent.clear()
    return model.eval()


def main() -> None:
    """Train, say how it goes, and write the model's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the model's folder, such as data/models/vlm-mini")
    parser.add_argument("--work", type=Path, default=Path("build/models/vlm-mini"), help="where to go on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    tokenizer = new_tokenizer()
    model = train(tokenizer, digit_images("train"), arguments.work, arguments.seed, STEPS)
    model.generation_config = GenerationConfig(**special_ids(tokenizer))
    write_model(arguments.out, model, tokenizer)
    write_figures("vlm-mini", arguments.out)
    shutil.rmtree(arguments.work)
    print(f"Written to {arguments.out}")


if __name__ == "__main__":
    main()

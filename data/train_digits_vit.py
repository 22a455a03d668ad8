"""Train the small vision transformer that ships with attnlab, on scikit-learn's digits, on a CPU.

    pip install 'attnlab[models]'
    python data/train_digits_vit.py --out data/models/digits-vit --work build/models/digits-vit

1797 images of 8 x 8 pixels (Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository 1998, https://doi.org/10.24432/C50P49). A quarter is set aside by a fixed seed before anything is learned,
and is written beside the weights, so that whoever has the folder can measure the model. The number of steps is fixed
beforehand: the held-out images decide nothing. Every step draws its batch from a generator seeded with the step's
number, so a run that was stopped goes on from its checkpoint as if it had not been.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from shipped_writing import write_model
from torch import Tensor
from training import Progress, descend, learning_rate, load_checkpoint, save_checkpoint
from transformers import ViTConfig, ViTForImageClassification

from attnlab.verify import write_figures
from attnlab.verify.digits_vit import HELD_OUT_FILE, pixels

SPLIT_SEED, HELD_OUT = 1797, 449
STEPS, BATCH, SHIFT = 5000, 128, 1
PEAK, WEIGHT_DECAY = 2e-3, 0.05
SAVE_EVERY = 200


class Images(NamedTuple):
    """Images [N, 8, 8] of 0 to 16, and the digits that they show [N], both uint8."""

    images: Tensor
    labels: Tensor


class Digits(NamedTuple):
    """Images to learn from, and images never learned from."""

    train: Images
    held_out: Images


def digits() -> Digits:
    """Return scikit-learn's digits, split by a seed of its own, the same whatever the training's seed is."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(found.images))
    images = torch.from_numpy(found.images[order].astype(np.uint8))
    labels = torch.from_numpy(found.target[order].astype(np.uint8))
    cut = len(order) - HELD_OUT
    return Digits(Images(images[:cut], labels[:cut]), Images(images[cut:], labels[cut:]))


def shifted(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Move each image [N, 8, 8] down by `rows` [N] and right by `columns` [N]; what moves in is 0.

    Example:
        >>> image = torch.zeros(1, 8, 8); image[0, 3, 4] = 1
        >>> shifted(image, torch.tensor([1]), torch.tensor([-1])).nonzero().tolist()
        [[0, 4, 3]]
    """
    size = images.shape[-1]
    i, j = torch.arange(size) - rows[:, None], torch.arange(size) - columns[:, None]
    moved = images[
        torch.arange(len(images))[:, None, None], i.clamp(0, size - 1)[:, :, None], j.clamp(0, size - 1)[:, None]
    ]
    inside = ((i >= 0) & (i < size))[:, :, None] & ((j >= 0) & (j < size))[:, None]
    return moved * inside


def batch(train: Images, seed: int, step: int) -> Images:
    """Draw the images of one step, each moved by up to a pixel; the same step always gets the same batch."""
    rng = np.random.default_rng([seed, step])
    chosen = torch.from_numpy(rng.integers(len(train.images), size=BATCH))
    rows, columns = torch.from_numpy(rng.integers(-SHIFT, SHIFT + 1, (2, BATCH)))
    return Images(shifted(train.images[chosen], rows, columns), train.labels[chosen])


def new_model(seed: int) -> ViTForImageClassification:
    """Return the model with random weights: patches of 2 x 2, so 16 of them and the class token."""
    torch.manual_seed(seed)
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            layer_norm_eps=1e-6,
            id2label={i: str(i) for i in range(10)},
            label2id={str(i): i for i in range(10)},
        )
    )


def accuracy(model: ViTForImageClassification, data: Images) -> float:
    """Return the share of images whose digit the model names."""
    with torch.inference_mode():
        return float((model(pixel_values=pixels(data.images)).logits.argmax(-1) == data.labels).double().mean())


def train(data: Digits, work: Path, seed: int, steps: int, stop: int | None = None) -> ViTForImageClassification:
    """Go on from where `work` has come to, to the end or to the step `stop`, and keep a checkpoint there."""
    model = new_model(seed)
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    done = load_checkpoint(work, model, (optimizer,))
    began = time.monotonic() - done.seconds
    end = steps if stop is None else stop
    for step in range(done.step, end):
        drawn = batch(data.train, seed, step)
        loss = model.train()(pixel_values=pixels(drawn.images), labels=drawn.labels.long()).loss
        descend(loss, model, (optimizer,), (PEAK * learning_rate(step, steps),))
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == end:
            seconds = time.monotonic() - began
            save_checkpoint(work, model, (optimizer,), Progress(step + 1, seconds))
            known = accuracy(model.eval(), data.train)
            print(
                f"step {step + 1} of {steps}, {seconds:.0f} s, loss {loss.item():.3f}, learned {known:.4f}", flush=True
            )
    return model.eval()


def main() -> None:
    """Train, say how it goes, and write the model's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the model's folder, such as data/models/digits-vit")
    parser.add_argument("--work", type=Path, default=Path("build/models/digits-vit"), help="where to go on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    data = digits()
    model = train(data, arguments.work, arguments.seed, STEPS)
    write_model(arguments.out, model)
    held_out = {name: part.contiguous() for name, part in data.held_out._asdict().items()}
    save_file(held_out, arguments.out / HELD_OUT_FILE)
    write_figures("digits-vit", arguments.out)
    shutil.rmtree(arguments.work)
    print(f"Written to {arguments.out}")


if __name__ == "__main__":
    main()

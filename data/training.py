"""What the scripts that train share: the rate of a step, the optimizers, a step down the gradient, and checkpoints.

Muon (https://kellerjordan.github.io/posts/muon/) moves the layers' matrices, AdamW the rest. A checkpoint holds weights
and moments; what a step learns from is drawn from its number, so a run that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

WARM_UP = 50
LEVEL_UNTIL = 0.35
WEIGHT_DECAY = 0.1
CLIP = 1.0
FILE = "checkpoint.safetensors"


class Progress(NamedTuple):
    """How far training has come: steps done, and the seconds that they took."""

    step: int
    seconds: float


def learning_rate(step: int, steps: int, level_until: float = LEVEL_UNTIL) -> float:
    """Return the rate of a step as a share of the peak: a warm-up, level, then half a cosine down to nearly nothing.

    Example:
        >>> [round(learning_rate(step, 1000), 2) for step in (0, 49, 350, 675, 1000)]
        [0.02, 1.0, 1.0, 0.51, 0.02]
    """
    done = max(0.0, (step - level_until * steps) / ((1 - level_until) * steps))
    return min(1.0, (step + 1) / WARM_UP, 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)


def new_optimizers(model: nn.Module) -> tuple[Muon, AdamW]:
    """Return Muon for the layers' matrices, AdamW for the embedding and the gains; `descend` gives them their rates."""
    hidden = [weight for name, weight in model.named_parameters() if weight.ndim > 1 and ".layers." in name]
    embedding = [weight for name, weight in model.named_parameters() if weight.ndim > 1 and ".layers." not in name]
    gains = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": embedding, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}]
    return (
        Muon(hidden, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        AdamW(groups, betas=(0.9, 0.98), fused=True),
    )


def descend(loss: Tensor, model: nn.Module, optimizers: Sequence[Optimizer], rates: Sequence[float]) -> None:
    """Do one step down the gradient of the loss, clipped, each optimizer at its rate."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    for optimizer, rate in zip(optimizers, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()


def save_checkpoint(folder: Path, model: nn.Module, optimizers: Sequence[Optimizer], progress: Progress) -> None:
    """Write weights, moments and progress; the old checkpoint stays until the new one is whole."""
    tensors = {}
    for name, weight in model.named_parameters():
        tensors[f"weight {name}"] = weight.detach()
        for optimizer in optimizers:
            tensors |= {f"{key} {name}": value for key, value in optimizer.state.get(weight, {}).items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "new", metadata={"progress": json.dumps(progress)})
    (folder / "new").replace(folder / FILE)


def load_checkpoint(folder: Path, model: nn.Module, optimizers: Sequence[Optimizer]) -> Progress:
    """Take up a checkpoint where there is one; return how far it had come."""
    path = folder / FILE
    if not path.exists():
        return Progress(0, 0.0)
    weights = dict(model.named_parameters())
    owners = {weight: o for o in optimizers for group in o.param_groups for weight in group["params"]}
    with safe_open(path, "pt") as file:
        for entry in file.keys():  # noqa: SIM118
            key, name = entry.split(" ")
            if key == "weight":
                weights[name].data.copy_(file.get_tensor(entry))
            else:
                owners[weights[name]].state[weights[name]][key] = file.get_tensor(entry)
        return Progress(*json.loads(file.metadata()["progress"]))

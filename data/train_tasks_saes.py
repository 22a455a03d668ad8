"""Train the attention-output SAEs of `tasks` with sae-lens, and the same of random weights, in minutes on one core.

    python data/train_tasks_saes.py --model data/models/tasks

An SAE reads z of all heads of a layer, concatenated (`hook_z`), at every token of the mixture that the model itself
learned from (`tasks_batches`), drawn anew. It has 1024 features, 8 times the model's width, of which the 20 largest
are active at a token (TopK, https://arxiv.org/abs/2406.04093), and is written to `saes/layer-N` in sae-lens' format and
half precision. Both layers are trained in one pass.

The control is the model as it was before training, with weights of another seed, and SAEs trained alike on it. Of them
only the figures are kept, in `saes/random-weights.json`; they are printed beside those of the SAEs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.mixing_buffer import multi_hook_concat_split_iter
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from shipped_batches import stream_of
from shipped_corpus import corpus
from tasks_batches import LENGTH, Batch, Mixture
from torch import Tensor
from train_tasks import SCHEDULE, new_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from attnlab import capture
from attnlab.sae import load_sae
from attnlab.sae.stored import FOLDER
from attnlab.verify import write_figures
from attnlab.verify.attention_saes import figures_of

LAYERS = (0, 3)
"""Those whose heads have the largest effects on the tasks in all, by `truth.json`."""
CONTROL = "random-weights.json"


class Plan(NamedTuple):
    """How SAEs are trained.

    Attributes:
        features: F.
        active: how many of them at a token.
        tokens: how many are seen in all.
        batch: how many in a step.
        rate: the peak of the learning rate; it rises for a twentieth of the steps and falls to 0 in the last third.
        unused: after how many tokens without being active a feature is made to learn what the others leave over.
        mixed: from how many tokens a step's are drawn.
    """

    features: int = 1024
    active: int = 20
    tokens: int = 600_000
    batch: int = 1024
    rate: float = 5e-3
    unused: int = 40_000
    mixed: int = 65_536


def mixture_of(tokenizer: PreTrainedTokenizerFast, seed: int) -> Mixture:
    """What the model learned from."""
    texts = [document.text for document in corpus().train]
    return Mixture(stream_of(texts, tokenizer), tokenizer, seed)


def drawn(mixture: Mixture) -> Iterator[Batch]:
    """Batches as in the model's last part of training, drawn anew from the same prompts and text."""
    step = sum(part.stage.steps for part in SCHEDULE)
    while True:
        yield mixture.batch(SCHEDULE[-1], step)
        step += 1


def outputs(model: LlamaForCausalLM, batches: Iterator[Batch], layers: tuple[int, ...]) -> Iterator[dict[str, Tensor]]:
    """By the name of a hook, z of its layer at every token but padding, [tokens, heads * Dv]."""
    for batch in batches:
        with torch.no_grad(), capture(model, qkv=lambda site: site.layer in layers) as session:
            model.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
        real = batch.segments >= 0
        yield {
            hook(call.layer): call.z.transpose(1, 2).flatten(2)[real] for call in session.calls if call.z is not None
        }


def hook(layer: int) -> str:
    """TransformerLens' name of a layer's z."""
    return f"blocks.{layer}.attn.hook_z"


def train(
    model: LlamaForCausalLM, batches: Iterator[Batch], layers: tuple[int, ...], plan: Plan, seed: int, out: Path
) -> None:
    """Train an SAE of each layer and write it to `out/layer-N`."""
    torch.manual_seed(seed)
    heads = model.config.num_attention_heads
    names = {f"layer-{layer}": hook(layer) for layer in layers}
    saes = {
        name: TopKTrainingSAE(
            TopKTrainingSAEConfig(
                d_in=heads * model.config.head_dim,
                d_sae=plan.features,
                k=plan.active,
                normalize_activations="expected_average_only_in",
                reshape_activations="hook_z",
                metadata=SAEMetadata(
                    model_name="tasks", hook_name=where, n_heads=heads, context_size=LENGTH, prepend_bos=True
                ),
            )
        )
        for name, where in names.items()
    }
    steps = plan.tokens // plan.batch
    settings = SAETrainerConfig(
        total_training_samples=steps * plan.batch,
        train_batch_size_samples=plan.batch,
        lr=plan.rate,
        lr_end=0.0,
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=steps // 3,
        dead_feature_window=plan.unused // plan.batch,
        n_batches_for_norm_estimate=8,
    )
    z = outputs(model, batches, layers)
    given = multi_hook_concat_split_iter(plan.mixed, plan.batch, z, list(names.values()))
    for name, sae in MultiSAETrainer(settings, saes, names, given).fit().items():
        sae.fold_W_dec_norm()
        sae.to(dtype=torch.float16)
        sae.save_inference_model(out / name)


def main() -> None:
    """Train both, print all figures, write those of the control, and the model's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the model's folder, such as data/models/tasks")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    began = time.monotonic()

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    mixture = mixture_of(tokenizer, arguments.seed)
    control = new_model(tokenizer, arguments.seed + 1).eval()
    found = {}
    with TemporaryDirectory() as aside:
        for name, of, out in (("tasks", model, arguments.model / FOLDER), ("random weights", control, Path(aside))):
            train(of, drawn(mixture), LAYERS, Plan(), arguments.seed, out)
            saes = {path.name: load_sae(path) for path in sorted(out.glob("layer-*"))}
            found[name] = figures_of(of, tokenizer, saes)
            print(f"{name}, after {time.monotonic() - began:.0f} s", flush=True)
    for figure, value in found["tasks"].items():
        print(f"{figure}: {value:.4f}, of random weights {found['random weights'][figure]:.4f}")
    kept = {figure: round(value, 4) for figure, value in found["random weights"].items()}
    (arguments.model / FOLDER / CONTROL).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    write_figures("tasks", arguments.model)


if __name__ == "__main__":
    main()

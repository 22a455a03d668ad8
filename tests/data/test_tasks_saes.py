"""The SAEs of `tasks`: what their figures say, through captures and through sae-lens, and how they are trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

import attnlab
from attnlab.interventions import Ablate, Replace
from attnlab.sae import load_sae, shipped_saes
from attnlab.tasks import TASKS, read_truth
from attnlab.verify import read_statement
from attnlab.verify.attention_saes import PROMPTS, SEED

MODEL = Path(__file__).parents[2] / "data" / "models" / "tasks"
FIGURES = read_statement(MODEL).figures
STATED = {figure.name: figure.value for figure in FIGURES}
NAMES = ("layer-0", "layer-3")
CONTROL = json.loads((MODEL / "saes" / "random-weights.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model() -> attnlab.models.Model:
    return attnlab.load_model("tasks")


def test_stated_losses_on_prompts_are_those_of_captures_that_replace_z(model: attnlab.models.Model) -> None:
    several = [
        make(model, PROMPTS, seed=SEED, words="held_out", templates="held_out")
        for name, make in TASKS.items()
        if name != "greater_than"
    ]

    def answers(*edits: Replace | Ablate) -> Tensor:
        found = []
        for prompts in several:
            with torch.no_grad(), attnlab.capture(model, interventions=edits):
                logits = model.hf(**prompts.clean).logits
            assert prompts.answers.shape[1] == 1
            last = logits[torch.arange(len(prompts)), prompts.rows.last]
            found.append(cross_entropy(last, prompts.answers[:, 0], reduction="none"))
        return torch.cat(found).double().mean()

    # Greater-than has many right answers; without it the loss recovered is not the stated one, but close.
    plain = answers()
    for name in NAMES:
        sae = load_sae(f"tasks/{name}")
        layer = f"L{sae.layer}"
        zeroed = answers(Ablate(layer))
        replaced = answers(Replace(layer, sae.reconstruct))
        recovered = float((zeroed - replaced) / (zeroed - plain))
        assert abs(recovered - STATED[f"SAE {name}, loss recovered, prompts"]) < 0.05


def test_few_features_keep_most_of_a_loss_that_random_weights_do_not_have() -> None:
    assert [f"tasks/{name}" for name in NAMES] == shipped_saes()
    for name in NAMES:
        for data in ("text", "prompts"):
            assert 8 < STATED[f"SAE {name}, L0, {data}"] < 25
            assert STATED[f"SAE {name}, loss recovered, {data}"] > 0.9
        assert STATED[f"SAE {name}, dead features"] < 0.3
    units = {"loss recovered": "1", "loss": "nats per token", "L0": "features", "dead features": "1"}
    for figure in FIGURES:
        if figure.name.startswith("SAE ") and (what := figure.name.split(", ")[1]) in units:
            assert figure.unit == units[what]
    assert set(CONTROL) == {figure for figure in STATED if figure.startswith("SAE ")}
    for name in NAMES:
        for data in ("text", "prompts"):
            zeroed, plain = f"SAE {name}, loss with z 0, {data}", f"SAE {name}, loss, {data}"
            assert STATED[zeroed] - STATED[plain] > 0.5 > 0.2 > CONTROL[zeroed] - CONTROL[plain]


def test_they_are_of_the_layers_whose_heads_have_the_largest_effects() -> None:
    truth = read_truth(MODEL)
    effects = sum(truth.heads(task).groupby("layer")["effect"].apply(lambda of: of.abs().sum()) for task in TASKS)
    assert {f"layer-{layer}" for layer in effects.nlargest(2).index} == set(NAMES)


def test_sae_lens_loads_them_and_reconstructs_the_same(model: attnlab.models.Model) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    prompts = TASKS["ioi"](model, 4, seed=1)
    with torch.no_grad(), attnlab.capture(model, qkv=True) as session:
        model.hf(**prompts.clean)
    for name in NAMES:
        folder = MODEL / "saes" / name
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 1_100_000
        with safe_open(folder / "sae_weights.safetensors", "pt") as weights:
            assert {weights.get_tensor(key).dtype for key in weights.keys()} == {torch.float16}  # noqa: SIM118
        theirs, ours = sae_lens.SAE.load_from_disk(folder, dtype="float32"), load_sae(folder)
        assert sae_lens.SAE.load_from_disk(folder).dtype == torch.float16
        z = session.calls[int(ours.layer or 0)].z
        assert z is not None
        z = z.transpose(1, 2)
        assert theirs.cfg.metadata.hook_name == f"blocks.{ours.layer}.attn.hook_z"
        assert torch.allclose(ours.encode(z), theirs.encode(z), atol=1e-5)
        assert torch.allclose(ours.reconstruct(z), theirs(z), atol=1e-5)


def test_training_gives_the_same_bytes_again_and_learns(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    pytest.importorskip("sae_lens")
    training, batches = script("train_tasks_saes"), script("tasks_batches")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        max_position_embeddings=32, initializer_range=0.5,
    )  # fmt: skip
    tiny = LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 40, (40, 8, 32))
    segments = torch.arange(32).div(16, rounding_mode="floor").expand(8, 32)
    given = [batches.Batch(part, segments, torch.zeros_like(part)) for part in ids]
    plan = training.Plan(features=64, active=4, tokens=8192, batch=256, rate=1e-2, unused=1024, mixed=1024)
    for name in ("one", "two"):
        training.train(tiny, iter(given), (0, 1), plan, 5, tmp_path / name)
    saes = {name: load_sae(tmp_path / "one" / name) for name in ("layer-0", "layer-1")}
    for name, sae in saes.items():
        files = [tmp_path / run / name / "sae_weights.safetensors" for run in ("one", "two")]
        assert files[0].read_bytes() == files[1].read_bytes()
        held_out = next(training.outputs(tiny, iter(given[-1:]), (0, 1)))[training.hook(int(sae.layer or 0))]
        missed = (held_out - sae.reconstruct(held_out)).square().sum()
        assert missed < 0.5 * (held_out - held_out.mean(0)).square().sum()
        assert (sae.encode(held_out) > 0).sum(1).float().mean() < 8
        assert sae.W_dec.norm(dim=1) == pytest.approx(torch.ones(64), abs=1e-3)

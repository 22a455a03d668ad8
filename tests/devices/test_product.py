"""Analyses, experiments and what else reads models, on a device that is not the CPU, against the same on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from attnlab_analyses.duo_gates import DuoGates
from attnlab_analyses.key_budget_loss import KeyBudgetLoss
from attnlab_analyses.needle import NeedleTest
from attnlab_analyses.sink_ablation import SinkAblation
from attnlab_analyses.spans import Spans
from attnlab_analyses.streaming import StreamingHeads
from torch.testing import assert_close

import attnlab
from attnlab import EntropyMonitor, entropy_penalty, load_model
from attnlab.attribution import activation_patching, attribution_patching, direct_logit_attribution, logit_difference
from attnlab.monitor.bound import logit_norms, row_bounds
from attnlab.sae import load_sae, shipped_saes
from attnlab.tasks import induction, score
from attnlab.weights import (
    composition_scores,
    copying_scores,
    matching_scores,
    read_weights,
    token_copying,
    weight_bounds,
)

from ..capture.families import FAMILIES

SEQUENCES = [[3, 14, 15, 9, 26, 5] * 4, [5, 8, 9, 7, 9, 21, 8, 26, 13, 8, 3, 27, 9, 9] * 3, [1, 2]]
TEXTS = ["the cat saw a red bird on the mat and then the cat sat", "a dog sat by the old red door"]
IDS = torch.randint(3, 56, (3, 10), generator=torch.Generator().manual_seed(3))


def same(found: Any, expected: Any) -> None:
    """Tables, arrays and findings of two results are the same."""
    assert found.findings == expected.findings
    pd.testing.assert_frame_equal(found.table, expected.table, rtol=1e-4, atol=1e-5)
    assert found.arrays.keys() == expected.arrays.keys()
    for name, array in found.arrays.items():
        np.testing.assert_allclose(array.values, expected.arrays[name].values, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", ["entropy", "sinks", "roles", "patterns", "budgets"])
def test_an_analysis_finds_on_the_device_what_it_finds_on_the_cpu(name, tiny_checkpoint_of_ids, tmp_path, device):
    def found(place: Any) -> Any:
        run = attnlab.analyze(
            tiny_checkpoint_of_ids, SEQUENCES, analyses=[name], device=str(place), out=tmp_path / str(place),
            batch_size=2, progress=False,
        )  # fmt: skip
        return run[name]

    same(found(device), found("cpu"))


def test_two_analyses_at_once_read_text_and_padding_on_the_device(tiny_checkpoint, tiny_encoder_decoder, device):
    for checkpoint, data in (
        (tiny_checkpoint, TEXTS),
        (tiny_encoder_decoder, [{"text": text, "target": text} for text in TEXTS]),
    ):
        found, expected = (
            attnlab.analyze(checkpoint, data, analyses=["entropy", "sinks"], device=place, batch_size=2, progress=False)
            for place in ("cuda", "cpu")
        )
        for name in expected:
            same(found[name], expected[name])


def test_a_model_goes_to_the_device_unless_said(tiny_checkpoint, device):
    assert load_model(tiny_checkpoint).device.type == device.type
    assert load_model(tiny_checkpoint, device="cpu").device.type == "cpu"


EXPERIMENTS = {
    "streaming": StreamingHeads(sink=2, recent=8),
    "duo gates": DuoGates(steps=2, longest=48, shortest=32, passkeys=2),
    "key budgets": KeyBudgetLoss(policies=["hindsight", "h2o", "random"], budgets=[1.0, 0.5]),
    "needle": NeedleTest(lengths=(48,), prompts=2, least_recall=0.0),
    "needle, by itself": NeedleTest(lengths=(48,), prompts=2, least_recall=0.0, generate=True),
    "sinks": SinkAblation(skip=2),
    "sinks above a threshold": SinkAblation(keys="threshold", threshold=0.2, skip=2),
    "spans": Spans(block=8, sink=8),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_finds_on_the_device_what_it_finds_on_the_cpu(name, tiny_checkpoint_of_ids, device):
    found, expected = (
        attnlab.experiment(tiny_checkpoint_of_ids, EXPERIMENTS[name], SEQUENCES, device=place, seed=1)
        for place in ("cuda", "cpu")
    )
    same(found, expected)


def test_an_experiments_steps_are_on_the_cpu_with_a_folder_and_without(tiny_checkpoint_of_ids, tmp_path, device):
    from attnlab.experiments import Context

    model = load_model(tiny_checkpoint_of_ids, device=str(device))
    seen = {}
    for folder in (None, tmp_path):
        context = object.__new__(Context)
        context.folder, context._used, context._identity = folder, set(), "this"
        seen[folder] = context.step("part", lambda: {"weights": next(model.hf.parameters())[0]})["weights"]
    assert not any(tensor.is_cuda or tensor.requires_grad for tensor in seen.values())


def test_views_are_the_same(tiny_checkpoint, tiny_encoder_decoder, device):
    for checkpoint, more in ((tiny_checkpoint, {}), (tiny_encoder_decoder, {"target": TEXTS[1]})):
        found, expected = (
            attnlab.view(load_model(checkpoint, device=place), TEXTS[0], **more) for place in ("cuda", "cpu")
        )
        assert found.html == expected.html if isinstance(found.html, str) else found.html() == expected.html()


ATTRIBUTIONS = {
    "direct": lambda model: direct_logit_attribution(model, IDS, [7, 8, 9], [4, 5, 6], positions=[2, -1], batch_size=2),
    "patching": lambda model: activation_patching(
        model, IDS, IDS.flip(1), logit_difference([7, 8, 9], [4, 5, 6]), positions=[1, -1], batch_size=2
    ),
    "heads": lambda model: activation_patching(model, IDS, IDS.flip(1), logit_difference([7, 8, 9]), direction="noise"),
    "gradients": lambda model: attribution_patching(
        model, IDS, IDS.flip(1), logit_difference(torch.tensor([7, 8, 9])), steps=2, positions="each", batch_size=2
    ),
}


@pytest.mark.parametrize("kind", ATTRIBUTIONS)
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_attributions_are_the_same(name, kind, device):
    model = FAMILIES[name].build()
    there = copy.deepcopy(model).to(device)
    same(ATTRIBUTIONS[kind](there), ATTRIBUTIONS[kind](model))


def test_weights_are_read_on_the_device(device):
    def found(place: Any) -> list[Any]:
        model = load_model("known-circuit", device=str(place))
        weights = read_weights(model)
        scores = [composition_scores(weights, mode) for mode in ("Q", "K", "V")]
        scores += [copying_scores(weights, embedded=True), matching_scores(weights), weights.ov(1).of_head(0).norm()]
        scores += list(token_copying(model, range(4, 40)))
        scores += [bound.bound for bound in weight_bounds(load_model("pydoc-4l", device=str(place)), IDS)]
        return [t.cpu() if isinstance(t, torch.Tensor) else t for t in scores]

    for mine, theirs in zip(found(device), found("cpu"), strict=True):
        assert_close(mine, theirs, rtol=1e-3, atol=1e-4, equal_nan=True)


def test_a_training_step_is_watched_on_the_device(device):
    def found(place: Any) -> tuple[pd.DataFrame, Any]:
        model = FAMILIES["GPT2LMHeadModel"].build().to(place).train()
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        monitor = EntropyMonitor(model, every=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ids, mask = IDS.to(place), (torch.arange(10) < torch.tensor([[10], [7], [4]])).to(place)
        for _ in range(2):
            model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()
        model.eval()
        with attnlab.capture(model, emit=attnlab.Emit(entropy=True, visible=True), qkv=True) as session:
            loss = model(input_ids=ids, labels=ids).loss
            penalty = entropy_penalty(session.calls, floor=0.9)
            (loss + penalty).backward()
        bounds = [row_bounds(logit_norms(call), call.emitted.visible) for call in session.calls]
        return monitor.frame(), [penalty.detach().cpu(), *(p.grad.cpu() for p in model.parameters()), *_flat(bounds)]

    (frame, tensors), (expected, others) = found(device), found("cpu")
    pd.testing.assert_frame_equal(frame, expected, rtol=1e-3)
    assert_close(tensors, others, rtol=1e-3, atol=1e-4)


def _flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value.detach().cpu()]
    return [each for part in value for each in _flat(part)] if isinstance(value, (tuple, list)) else []


def test_saes_are_loaded_to_the_device_and_read_what_a_model_gives_there(device):
    name = shipped_saes()[0]
    sae, expected = load_sae(name, device=str(device)), load_sae(name)
    z = torch.randn(2, 5, sae.W_enc.shape[0], generator=torch.Generator().manual_seed(0))
    chosen = sae.encode(z.to(device)).sum((0, 1)).topk(3).indices
    for mine, theirs in (
        (sae.reconstruct(z.to(device)), expected.reconstruct(z)),
        (sae.head_share, expected.head_share),
        (sae.directions(chosen), expected.directions(chosen.cpu())),
        (sae.directions([0, 1]), expected.directions([0, 1])),
        (sae.direct_feature_attribution(z.to(device), [0, 1]), expected.direct_feature_attribution(z, [0, 1])),
    ):
        assert mine.is_cuda
        assert_close(mine.cpu(), theirs)


def test_tasks_are_scored_on_the_device(device):
    found, expected = (
        score(model, induction(model, 8))
        for model in (load_model("pydoc-4l", device=place) for place in ("cuda", "cpu"))
    )
    assert_close(list(found[:-1]), list(expected[:-1]), rtol=1e-4, atol=1e-6)

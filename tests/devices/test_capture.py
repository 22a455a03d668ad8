"""Captures of models on a device that is not the CPU, against the same captures on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from attnlab_kernels import Emit
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

from attnlab.capture import capture
from attnlab.interventions import (
    Ablate,
    KnockOut,
    Patch,
    ProjectSubspace,
    RedistributeSinks,
    Replace,
    Scale,
    Streaming,
    Temperature,
    TowardsIdentity,
    mean_outputs,
)

from ..capture.families import FAMILIES
from ..capture.families.measure import output_of

NAMES = (
    "GPT2LMHeadModel", "LlamaForCausalLM", "Gemma2ForCausalLM", "GptOssForCausalLM", "BertForMaskedLM",
    "T5ForConditionalGeneration", "WhisperForConditionalGeneration", "ViTForImageClassification",
    "LlavaForConditionalGeneration",
)  # fmt: skip
IDS = torch.randint(3, 56, (2, 12), generator=torch.Generator().manual_seed(3))
OTHER = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(4))
CLOSE = {"rtol": 1e-3, "atol": 1e-3} if torch.cuda.is_available() else {}
"""A GPU rounds otherwise; what is pretended rounds as the CPU does."""


def statistics(site: Any) -> Emit:
    """Statistics of rows and keys, and entries that are chosen on the site's device."""
    few = torch.tensor([0, -1], device=site.device)
    return Emit(entropy=True, lse=True, key_sum=True, pool=4, offsets=(0, 1, 2, 4, 16), rows=few, columns=few, top_k=2)


def moved(value: Any, device: Any) -> Any:
    """A value, or a dictionary of them, with its tensors on a device."""
    if isinstance(value, dict):
        return {key: moved(each, device) for key, each in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def tensors_of(call: Any) -> dict[str, Tensor]:
    """The statistics of a call by name, and its z."""
    found = {f"z of {call.kind} {call.layer}": call.z} if call.z is not None else {}
    for name, value in vars(call.emitted).items():
        for i, each in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(each, Tensor):
                found[f"{name}.{i} of {call.kind} {call.layer}"] = each
    return found


def captured(model: Any, inputs: Any, device: Any, **options: Any) -> dict[str, Tensor]:
    """The output of a forward on a device, and what a capture of it found."""
    model = copy.deepcopy(model).to(device)
    with torch.no_grad(), capture(model, **{"emit": statistics, "qkv": True} | options) as session:
        output = output_of(model(**moved(inputs, device)))
    found = {"output": output}
    for call in session.calls:
        found |= tensors_of(call)
    return found


def agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.is_cuda, name
        assert_close(
            value.cpu(), expected[name], equal_nan=True, **CLOSE, msg=lambda said, name=name: f"{name}: {said}"
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_read_on_the_device_as_on_the_cpu(name, device):
    model, inputs = FAMILIES[name].build(), FAMILIES[name].inputs()
    agree(captured(model, inputs, device), captured(model, inputs, "cpu"))


def test_positions_of_documents_that_are_packed_are_read_on_the_device(device):
    model = FAMILIES["LlamaForCausalLM"].build()
    inputs = {"input_ids": IDS, "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]] * 2)}
    agree(captured(model, inputs, device), captured(model, inputs, "cpu"))


def test_hidden_states_and_the_keys_of_an_image_are_read_on_the_device(device):
    model = FAMILIES["LlavaForConditionalGeneration"].build().to(device)
    inputs = moved(FAMILIES["LlavaForConditionalGeneration"].inputs(), device)
    with torch.no_grad(), capture(model, hidden=lambda site: site.kind == "self") as session:
        model(**inputs)
    call = session.calls[-1]
    assert call.hidden.is_cuda
    image = call.site.keys.image.to(device)
    assert image.equal(inputs["input_ids"] == model.config.image_token_id)


def test_what_is_kept_on_the_cpu_is_there(device):
    model = FAMILIES["LlamaForCausalLM"].build().to(device)
    with torch.no_grad(), capture(model, emit=statistics, keep="cpu", qkv=True) as session:
        model(IDS.to(device))
    assert not any(value.is_cuda for call in session.calls for value in tensors_of(call).values())


@pytest.mark.parametrize("kind", [StaticCache, DynamicCache])
def test_caches_with_windows_are_read_on_the_device(kind, device):
    def pieces(model: Any, place: Any) -> dict[str, Tensor]:
        model = copy.deepcopy(model).to(place)
        cache = kind(config=model.config, **({"max_cache_len": 20} if kind is StaticCache else {}))
        with torch.no_grad(), capture(model, emit=Emit(entropy=True, key_sum=True)) as session:
            for piece in IDS.to(place).split([7, 4, 1], 1):
                model(piece, past_key_values=cache)
        calls = [tensors_of(call) for call in session.calls]
        return {f"{name} in call {i}": value for i, call in enumerate(calls) for name, value in call.items()}

    model = FAMILIES["Gemma3ForCausalLM"].build()
    agree(pieces(model, device), pieces(model, "cpu"))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "WhisperForConditionalGeneration"])
def test_what_is_generated_on_the_device_is_read(name, device):
    model, inputs = FAMILIES[name].build().to(device), moved(FAMILIES[name].inputs(), device)
    inputs = {key: value for key, value in inputs.items() if not key.startswith("decoder")}
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "disable_compile": True}
    own = model.generate(**inputs, **options)
    with capture(model, emit=Emit(entropy=True)) as session:
        read = model.generate(**inputs, **options)
    assert own.equal(read)
    assert all(call.emitted.entropy.is_cuda for call in session.calls)


SOME = {0: [1, 2]}
EDITS = {
    "zero": Ablate(SOME, positions=[2, -1]),
    "mean": Ablate(SOME, {0: OTHER.mean(0)[0].expand(4, 8)}),
    "patch": Patch(SOME, {0: OTHER[None].expand(4, -1, -1, -1).transpose(0, 1)}),
    "scale": Scale(SOME, torch.tensor([[1.0, 0.5, 2.0, 3.0]] * 2)),
    "replace": Replace(SOME, torch.tanh),
    "keys": KnockOut(SOME, [1, 3]),
    "keys of each": KnockOut(SOME, torch.tensor([[1], [3]]), rows=[1]),
    "pairs": KnockOut(SOME, pairs=[(3, 2), (5, 0), (5, 5)], rows=[0]),
    "temperature": Temperature(SOME, torch.tensor([[1.0, 0.5, 2.0, 3.0]] * 2)),
    "streaming": Streaming(SOME, 1, 2),
    "redistribute": RedistributeSinks(SOME, [0, 2], share=0.7),
    "redistribute to some": RedistributeSinks(SOME, [2], [3, 4], share=1.0, positions=[4, 5]),
    "identity": TowardsIdentity(SOME, 0.4),
    "queries": ProjectSubspace(SOME, torch.eye(8)[:, :2]),
    "keys out": ProjectSubspace(SOME, torch.eye(8)[:, :2], of="k", out=True, positions=[1, 2]),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_intervention_made_of_tensors_of_the_cpu_edits_on_the_device(edit, device):
    model, inputs = FAMILIES["LlamaForCausalLM"].build(), FAMILIES["LlamaForCausalLM"].inputs()
    options = {
        "interventions": [EDITS[edit]],
        "emit": Emit(entropy=True, key_sum=True, pool=4, offsets=(0, 1, 2, 4, 16)),
    }
    agree(captured(model, inputs, device, **options), captured(model, inputs, "cpu", **options))


def test_means_are_taken_on_the_device(device):
    model = FAMILIES["LlamaForCausalLM"].build()
    expected = mean_outputs(model, [IDS])
    found = mean_outputs(copy.deepcopy(model).to(device), [IDS.to(device)])
    assert_close({key: value.cpu() for key, value in found.items()}, dict(expected))


def test_gradients_flow_through_a_capture_on_the_device(device):
    def gradients(place: Any) -> list[Tensor]:
        model = FAMILIES["GPT2LMHeadModel"].build().to(place)
        with capture(model, emit=Emit(entropy=True), interventions=[Temperature("L0", 0.7)]) as session:
            loss = output_of(model(IDS.to(place))).square().mean()
            (loss + sum(call.emitted.entropy.mean() for call in session.calls)).backward()
        return [p.grad.cpu() for p in model.parameters() if p.grad is not None]

    assert_close(gradients(device), gradients("cpu"))

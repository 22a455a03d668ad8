"""What the training scripts share: rates, steps and checkpoints, first weights, tokenizers, and a model's folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

Script = Callable[[str], ModuleType]
WORDS = {"yes": 0, "<pad>": 1, "<s>": 2, "</s>": 3, "no": 4}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=5, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_the_rate_warms_up_stays_level_and_falls(script: Script) -> None:
    rates = [script("training").learning_rate(step, 1000) for step in range(1000)]
    assert rates[:50] == pytest.approx([(step + 1) / 50 for step in range(50)])
    assert rates[50:351] == pytest.approx([1.0] * 301)
    assert all(later < earlier for earlier, later in pairwise(rates[350:]))
    assert rates[-1] == pytest.approx(0.02, abs=1e-4)


def test_each_weight_is_moved_by_one_optimizer_at_its_own_rate(script: Script) -> None:
    training, model = script("training"), llama()
    optimizers = training.new_optimizers(model)
    moved = [weight for o in optimizers for group in o.param_groups for weight in group["params"]]
    assert len(moved) == len({id(weight) for weight in moved}) == len(list(model.parameters()))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    ids = torch.tensor([[2, 0, 4, 4, 0, 3]])
    training.descend(1000 * model(input_ids=ids, labels=ids).loss, model, optimizers, (0.0, 1e-3))
    for name, weight in model.named_parameters():
        if "proj" in name:
            assert torch.equal(weight, before[name]), name
    # AdamW's first step is the rate in each number that has a gradient, after the decay, which gains do not have.
    gain = model.model.norm.weight - before["model.norm.weight"]
    assert gain.abs().max().item() == pytest.approx(1e-3, rel=1e-3)
    assert all(weight.grad is None for weight in model.parameters())


def test_a_step_is_clipped(script: Script) -> None:
    training = script("training")
    model = torch.nn.Linear(2, 1, bias=False)
    start = model.weight.detach().clone()
    training.descend(model(torch.tensor([30.0, 40.0])).sum(), model, (torch.optim.SGD(model.parameters()),), (0.5,))
    assert torch.allclose(start - model.weight, torch.tensor([[0.3, 0.4]]))


def test_a_folder_without_a_checkpoint_is_a_beginning(script: Script, tmp_path: Path) -> None:
    training, model = script("training"), llama()
    assert training.load_checkpoint(tmp_path, model, training.new_optimizers(model)) == training.Progress(0, 0.0)


def test_heads_begin_by_looking_for_tokens_like_their_own(script: Script) -> None:
    weights, model = script("first_weights"), llama()
    norms = [weight.detach().clone() for name, weight in model.named_parameters() if "norm" in name]
    weights.draw_for_width(model, ("q_proj", "v_proj"))
    weights.look_for_the_like(model.model.layers)
    for layer in model.model.layers:
        attention = layer.self_attn
        assert attention.q_proj.weight.std().item() == pytest.approx(16**-0.5, rel=0.2)
        products = attention.q_proj.weight.T @ attention.k_proj.weight
        assert torch.allclose(products, products.T, atol=1e-6)
        assert torch.linalg.eigvalsh(products).min() > -1e-5
        assert torch.allclose(attention.o_proj.weight, 0.3 * attention.v_proj.weight.T)
    same = zip(norms, (weight for name, weight in model.named_parameters() if "norm" in name), strict=True)
    assert all(torch.equal(one, other) for one, other in same)


def test_special_tokens_are_those_of_the_vocabulary(script: Script) -> None:
    tokenizers = script("shipped_tokenizers")
    wrapped = tokenizers.wrapped(Tokenizer(models.WordLevel(WORDS)), 8)
    assert wrapped("no", "yes")["input_ids"] == [2, 4, 0]
    assert tokenizers.special_ids(wrapped) == {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1}
    assert wrapped.unk_token is None
    assert wrapped.model_max_length == 8


def test_without_a_start_token_sequences_begin_as_they_did(script: Script) -> None:
    tokenizers = script("shipped_tokenizers")
    ends = Tokenizer(models.WordLevel({"yes": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    ends.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    wrapped = tokenizers.wrapped(ends, 8)
    assert wrapped("yes")["input_ids"] == [0, 1]
    assert wrapped("what")["input_ids"] == [2, 1]
    assert tokenizers.special_ids(wrapped) == {"eos_token_id": 1}


def test_a_folder_holds_half_precision_that_loads_as_full(script: Script, tmp_path: Path) -> None:
    model = llama()
    exact = model.lm_head.weight.detach().clone()
    tokenizer = script("shipped_tokenizers").wrapped(Tokenizer(models.WordLevel(WORDS)), 8)
    script("shipped_writing").write_model(tmp_path / "new" / "model", model, tokenizer)
    folder = tmp_path / "new" / "model"
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert {part.dtype for part in load_file(folder / "model.safetensors").values()} == {torch.float16}
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] == "float32"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.lm_head.weight, exact.half().float())
    assert AutoTokenizer.from_pretrained(folder)("no")["input_ids"] == [2, 4]


def test_a_folder_of_a_model_that_reads_no_words_has_no_tokenizer(script: Script, tmp_path: Path) -> None:
    script("shipped_writing").write_model(tmp_path, llama())
    assert not list(tmp_path.glob("tokenizer*"))

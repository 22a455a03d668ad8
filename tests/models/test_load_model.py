"""What can be loaded is loaded whole; what cannot is refused with one sentence."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from attnlab.errors import AttnlabError, AttnlabWarning, UnsupportedModelError
from attnlab.models import Model, load_model, shipped_models, shipped_path

SPECIAL = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
GPT2 = transformers.GPT2Config(n_layer=2, n_head=4, n_embd=16, vocab_size=20, n_positions=16, **SPECIAL)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of a tiny GPT-2."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(GPT2).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """The same, to be damaged."""
    return shutil.copytree(saved, tmp_path / "checkpoint")


def refused(source, *words, kind=AttnlabError, **options):
    with pytest.raises(kind) as caught:
        load_model(source, device="cpu", **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_a_folder_is_loaded_with_its_facts(saved):
    model = load_model(saved, device="cpu")
    assert isinstance(model, Model)
    assert (model.name, model.vocabulary, model.max_length) == (saved.name, 20, 16)
    assert model.layout.heads == {"self": (4, 4)}
    assert (model.tokenizer, model.layout.tokens) == (None, None)
    assert model.has_loss
    assert not model.is_encoder_decoder
    assert not model.hf.training


def test_loading_prints_nothing(saved, capfd):
    load_model(saved, device="cpu")
    assert capfd.readouterr() == ("", "")


def test_a_model_and_a_module_are_taken_as_they_are(saved):
    model = load_model(saved, device="cpu")
    assert load_model(model) is model
    assert load_model(model, max_length=5).max_length == 5
    assert load_model(model.hf).hf is model.hf


def test_half_precision_checkpoints_become_float32_on_a_cpu(saved, folder):
    transformers.GPT2LMHeadModel.from_pretrained(saved).to(torch.bfloat16).save_pretrained(folder)
    assert load_model(folder, device="cpu").dtype == torch.float32
    assert load_model(folder, device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    assert load_model(folder, device="cpu", dtype="float64").dtype == torch.float64


def test_a_tokenizer_is_loaded_and_its_tokens_are_readable(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<s>", "Ġthe", "a", "b", "Ċ"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    model = load_model(folder, device="cpu")
    assert model.layout.tokens[:5] == ("<s>", " the", "a", "b", "\n")
    assert len(model.layout.tokens) == 20


@pytest.mark.parametrize("name", shipped_models())
def test_a_shipped_model_is_loaded_by_its_name(name):
    assert load_model(name, device="cpu").name == name


def test_an_unknown_shipped_name_is_an_error():
    with pytest.raises(AttnlabError, match="comes with attnlab"):
        shipped_path("no-such-model")


def test_a_missing_folder_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "no folder", "nowhere")
    refused("./nowhere", "no folder")


def test_a_hub_id_that_cannot_be_had_is_refused(monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("offline")))
    refused("attnlab-tests/none-such", "neither a folder here", "hub")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path, folder):
    refused(tmp_path, "no config.json")
    refused(folder / "config.json", "is a file")
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights")


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "safetensors", "save_pretrained")


def test_damaged_files_are_refused(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:1000])
    refused(folder, "safetensors", "damaged")
    (folder / "model.safetensors").write_bytes(b"not safetensors at all, but long enough to look at")
    refused(folder, "safetensors", "damaged")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json", "JSON")
    (folder / "config.json").write_text("[]")
    refused(folder, "config.json", "object")


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_an_unknown_architecture_is_refused(folder):
    edit(folder, architectures=["GrandioseForCausalLM"])
    refused(folder, "GrandioseForCausalLM", kind=UnsupportedModelError)
    edit(folder, architectures=["pipeline"])
    refused(folder, "pipeline", kind=UnsupportedModelError)
    edit(folder, model_type="grandiose")
    refused(folder, "transformers does not know", "grandiose")


def test_an_architecture_that_is_not_stated_is_found_by_its_configuration(folder):
    edit(folder, architectures=None)
    assert type(load_model(folder, device="cpu").hf).__name__ == "GPT2LMHeadModel"


def test_code_of_a_checkpoint_is_not_run_unasked(folder):
    edit(folder, model_type="own", auto_map={"AutoConfig": "own.Config"})
    (folder / "own.py").write_text("raise SystemExit('ran')")
    refused(folder, "trust_remote_code")


def test_a_checkpoint_that_does_not_fill_the_model_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if name.endswith("h.1.attn.c_attn.bias"))
    save_file({k: v for k, v in weights.items() if k != gone}, folder / "model.safetensors", {"format": "pt"})
    refused(folder, "c_attn.bias", "missing")


def test_weights_of_other_shapes_are_refused(folder):
    edit(folder, n_embd=32)
    refused(folder, "does not fit", "has shape")


def test_weights_that_have_no_place_are_warned_of(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "extra.weight": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(AttnlabWarning, match=r"extra\.weight"):
        load_model(folder, device="cpu")


def test_models_whose_attention_is_hidden_are_refused_by_name(tmp_path):
    config = transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=20)
    bloom = transformers.BloomForCausalLM(config)
    refused(bloom, "BloomForCausalLM", kind=UnsupportedModelError)
    bloom.save_pretrained(tmp_path)
    refused(tmp_path, "BloomForCausalLM", kind=UnsupportedModelError)


def test_a_module_of_another_library_is_refused():
    refused(torch.nn.Linear(2, 2), "Linear")


def test_a_wrong_device_type_or_length_is_refused(saved):
    with pytest.raises(AttnlabError, match="warp"):
        load_model(saved, device="warp")
    refused(saved, "int3", dtype="int3")
    refused(saved, "max_length", max_length=0)


def test_positions_after_the_padding_index_limit_the_length():
    width = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.RobertaConfig(**width, vocab_size=20, max_position_embeddings=18, pad_token_id=1)
    assert load_model(transformers.RobertaForMaskedLM(config)).max_length == 16
    t5 = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=20, **SPECIAL)
    t5.decoder_start_token_id = 0
    assert load_model(transformers.T5ForConditionalGeneration(t5)).max_length is None

"""`load_model` and `analyze` over TransformerLens: the same numbers as over the transformers model itself."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

import attnlab
from attnlab.errors import AttnlabError
from attnlab.interventions import mean_outputs
from attnlab.models import load_model
from attnlab.runs.analysis import Batch

lens = pytest.importorskip("transformer_lens")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

IDS = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS, dtype=torch.bool)
MASK[1, 6:] = False
DATA = [[1, 2, 3, 4, 5, 6], [7, 8, 9]]


def loss_of(logits):
    losses = -logits.float().log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0]
    return losses * (MASK[:, 1:] & MASK[:, :-1])


def test_a_bridge_gives_the_numbers_of_its_model(bridge):
    wrapped = bridge("Llama", "sdpa")
    plain = copy.deepcopy(bridge("Llama", "sdpa"))
    import transformers

    alone = transformers.LlamaForCausalLM(plain.original_model.config).eval()
    torch.manual_seed(0)
    for parameter in alone.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model, other = load_model(wrapped), load_model(alone)
    assert (model.layout.heads, model.max_length, model.vocabulary) == (other.layout.heads, other.max_length, 50)
    assert model.tokenizer is wrapped.tokenizer
    batch = Batch((0, 1), IDS, MASK)
    assert torch.allclose(model.forward(batch, loss=True), other.forward(batch, loss=True), atol=1e-5)
    a, b = (attnlab.analyze(m, DATA, analyses=["entropy", "sinks"]).heads for m in (wrapped, alone))
    assert a[["layer", "head", "metric"]].equals(b[["layer", "head", "metric"]])
    assert (a["value"] - b["value"]).abs().max() < 1e-5
    means = [mean_outputs(m, [IDS]) for m in (model, other)]
    assert all(torch.allclose(means[0][key], means[1][key], atol=1e-5) for key in means[1])


def test_a_hooked_transformer_is_a_model(hooked):
    module = hooked(n_key_value_heads=2, output_logits_soft_cap=3.0)
    model = load_model(module)
    assert model.hf is module
    assert (model.layout.heads, model.max_length, model.vocabulary) == ({"self": (4, 4)}, 64, 50)
    batch = Batch((0, 1), IDS, MASK)
    with torch.no_grad():
        expected = loss_of(module(IDS, attention_mask=MASK.long()))
    assert torch.allclose(model.forward(batch, loss=True).float(), expected, atol=1e-5)
    heads = attnlab.analyze(module, DATA, analyses=["entropy"]).heads
    assert set(heads["layer"]) == {0, 1}
    assert load_model(model, max_length=10).max_length == 10
    assert model.fingerprint() == load_model(hooked(n_key_value_heads=2, output_logits_soft_cap=3.0)).fingerprint()
    assert model.fingerprint() != load_model(hooked(n_key_value_heads=2)).fingerprint()


def test_an_encoder_decoder_bridge_is_a_model(bridge):
    model = load_model(bridge("BART"))
    assert {kind: len(layers) for kind, layers in model.layout.heads.items()} == {"encoder": 2, "self": 2, "cross": 2}


def test_models_without_a_next_token_say_so(hooked):
    model = load_model(hooked(attention_dir="bidirectional"))
    with pytest.raises(AttnlabError, match="does not predict the next token"):
        model.forward(Batch((0, 1), IDS, MASK), loss=True)


def test_what_is_no_model_is_told():
    with pytest.raises(AttnlabError, match="Linear is no model of transformers or TransformerLens"):
        load_model(torch.nn.Linear(2, 2))


def test_transformer_lens_is_not_imported_for_others():
    code = (
        "import attnlab, attnlab.lens, sys, torch; from attnlab.lens.parts import lens_style; "
        "lens_style(torch.nn.Linear(1, 1)); sys.exit('transformer_lens' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

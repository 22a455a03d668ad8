from __future__ import annotations

import base64
import html
import json
import re

import numpy as np
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel

import attnlab
from attnlab.errors import AttnlabError
from attnlab.view.reading import beginning
from attnlab.view.text_view import KindView, TextView
from attnlab.view.tokens import readable

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u2028&"


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=32, n_embd=16, n_layer=2, n_head=2, attn_pdrop=0.0)
    return GPT2LMHeadModel(config).eval()


def embedded(page: str) -> dict:
    return json.loads(re.search(r'type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)[1])


def decoded(kind: dict, layer: int, head: int) -> np.ndarray:
    """The weights as the page's script reads them."""
    n_q, n_k, most = len(kind["queries"]), len(kind["keys"]), kind["most"]
    levels = np.frombuffer(base64.b64decode(kind["weights"]), np.uint8).reshape(-1, most, n_q, n_k)
    largest = np.frombuffer(base64.b64decode(kind["largest"]), "<f4").reshape(-1, most, n_q)
    return (levels[layer, head] / 255.0) ** 2 * largest[layer, head][:, None]


def test_patterns_are_the_eager_matrices(gpt2):
    ids = [3, 1, 4, 1, 5, 9, 2]
    view = attnlab.view(gpt2, ids)
    eager = GPT2LMHeadModel(gpt2.config)
    eager.load_state_dict(gpt2.state_dict())
    eager.eval().set_attn_implementation("eager")
    with torch.no_grad():
        expected = torch.stack(eager(torch.tensor([ids]), output_attentions=True).attentions)[:, 0]
    np.testing.assert_allclose(view.patterns, expected, atol=1e-6)
    kind = embedded(view.html())["kinds"][0]
    for layer in range(2):
        np.testing.assert_allclose(decoded(kind, layer, 1), expected[layer, 1], atol=1 / 255)
    assert kind["queries"] == [str(i) for i in ids]


def test_small_weights_keep_their_digits_on_the_page():
    weights = np.array([[[[0.9, 0.0975, 0.0025]]]], dtype=np.float32)
    view = TextView("m", {"self": KindView("self", weights, (1,), ("q",), ("a", "b", "c"))})
    shown = decoded(embedded(view.html())["kinds"][0], 0, 0)[0]
    assert shown[2] == pytest.approx(0.0025, abs=2e-4)
    assert shown[0] == pytest.approx(0.9, abs=1e-6)


def test_an_encoder_decoder_shows_all_three_kinds():
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=20, d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=4, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    view = attnlab.view(model, [5, 6, 7, 8, 9], target=[11, 12, 13])
    shapes = {kind: shown.weights.shape for kind, shown in view.kinds.items()}
    assert shapes == {"self": (1, 4, 3, 3), "cross": (1, 4, 3, 5), "encoder": (2, 2, 5, 5)}
    np.testing.assert_allclose(view.kinds["cross"].weights.sum(-1), 1.0, atol=1e-5)
    assert view.kinds["cross"].queries[1:] == ("11", "12")
    assert view.kinds["cross"].keys == ("5", "6", "7", "8", "9")


def test_a_long_text_is_cut_and_the_view_says_so(gpt2):
    view = attnlab.view(gpt2, list(range(20)), max_tokens=8)
    assert view.patterns.shape == (2, 2, 8, 8)
    assert view.note == "Shown: the first 8 of 20 tokens."


def test_fewer_tokens_are_shown_where_the_page_would_be_too_large(gpt2):
    model = attnlab.load_model(gpt2)
    view = beginning(model, list(range(20)), max_tokens=20, most_bytes=4 * 10 * 10 + 5)
    assert view.patterns.shape == (2, 2, 10, 10)
    assert "as many as all heads of this model leave room for" in view.note


@pytest.mark.parametrize(
    "asked", [{"text": []}, {"text": [1, 99]}, {"text": [1], "target": [2]}, {"text": [1], "max_tokens": 0}]
)
def test_what_cannot_be_shown_is_refused_in_a_sentence(gpt2, asked):
    with pytest.raises(AttnlabError):
        attnlab.view(gpt2, **asked)


def test_tokens_never_become_markup():
    weights = np.ones((1, 1, 1, 1), dtype=np.float32)
    view = TextView(HOSTILE, {"self": KindView("self", weights, (1,), (HOSTILE,), (HOSTILE,))}, note=HOSTILE)
    page = view.html()
    assert "<img" not in page
    assert "<script>alert" not in page
    assert "\u2028" not in re.search(r'type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)[1]
    assert embedded(page)["kinds"][0]["queries"] == [HOSTILE]
    frame = view._repr_html_()
    assert frame.count("<") == 2
    assert html.unescape(re.search(r'srcdoc="([^"]*)"', frame)[1]) == page


def test_views_on_one_page_have_elements_of_their_own(gpt2):
    view = attnlab.view(gpt2, [1, 2, 3])
    first, second = view.fragment(), view.fragment()
    names = [re.search(r'<section class="av" id="([^"]+)"', piece)[1] for piece in (first, second)]
    assert names[0] != names[1]


def test_a_page_loads_nothing(gpt2):
    page = attnlab.view(gpt2, [1, 2, 3]).html()
    assert "default-src 'none'" in page
    assert not re.search(r"https?://", page)


@pytest.mark.parametrize("text", [5, None, [1.5, 2.5], [[1], [2]]])
def test_what_is_no_text_is_one_sentence(text, gpt2):
    with pytest.raises(AttnlabError, match=r"expected"):
        attnlab.view(gpt2, text)


@pytest.mark.parametrize("text", [[1, 2], (1, 2), np.array([1, 2]), torch.tensor([[1, 2]]), [np.int64(1), np.int64(2)]])
def test_ids_come_in_any_shape(text, gpt2):
    assert attnlab.view(gpt2, text).patterns.shape[2:] == (2, 2)


def test_white_space_and_invisible_characters_can_be_seen():
    assert readable("  def\n") == "··def⏎"
    assert readable("\u202eabc") == "\\u202eabc"
    assert readable("a\u200bb") == "a\\u200bb"


def test_parts_of_a_character_are_put_together():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from attnlab.models import Model
    from attnlab.view.tokens import token_labels

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level)
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=16, n_embd=8, n_layer=1, n_head=1))
    model = Model(hf, name="bytes", tokenizer=tokenizer)
    assert token_labels(model, tokenizer("a é😀")["input_ids"]) == ["a", "·", "é", "⋯", "😀", "⋯", "⋯", "⋯"]

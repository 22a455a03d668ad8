"""Small checkpoints with random weights, made once: no test needs the network."""

from pathlib import Path

import pytest
import torch

WORDS = "the cat dog saw a bird on old mat and then sat by red door in house of green tree".split()  # noqa: SIM905


def _tokenizer() -> object:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3} | {word: 4 + i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers, 4 heads and 2 key heads, 32 positions, with a tokenizer of 24 words between <s> and </s>."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.5, pad_token_id=3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint_of_ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of 2 layers and 2 heads, 512 positions, 32 ids, without a tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=512, n_embd=8, n_layer=2, n_head=2, initializer_range=0.5)
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-gpt2"
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BART of 2 + 2 layers and 2 heads, 32 positions, with the tokenizer of `tiny_checkpoint`."""
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=32, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, init_std=0.5,
        bos_token_id=1, eos_token_id=2, pad_token_id=3, decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-bart"
    BartForConditionalGeneration(config).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)  # type: ignore[attr-defined]
    return folder

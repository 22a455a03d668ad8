"""Tiny random float64 decoders, and the output projection through which each layer's heads leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

_WIDTH = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_COMMON = {
    **_WIDTH, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 64, "max_position_embeddings": 64,
}  # fmt: skip
_GROUPED = {**_COMMON, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 64, "n_positions": 64},
    "LlamaForCausalLM": _GROUPED,
    "MistralForCausalLM": {**_GROUPED, "sliding_window": 5},
    "Qwen3ForCausalLM": _GROUPED,
    "Gemma2ForCausalLM": {**_GROUPED, "sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "Gemma3ForCausalLM": {**_GROUPED, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "GPTNeoXForCausalLM": {**_COMMON, "use_parallel_residual": True, "attention_bias": True},
    "PhiForCausalLM": _COMMON,
    "Olmo2ForCausalLM": _COMMON,
    "CohereForCausalLM": _COMMON,
    "GraniteForCausalLM": {**_COMMON, "residual_multiplier": 0.5, "logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "OPTForCausalLM": {
        "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32,
    },
    "GptOssForCausalLM": {**_GROUPED, "sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2},
    "BertForMaskedLM": _COMMON,
    "BitNetForCausalLM": _GROUPED,
    "ModernBertDecoderForCausalLM": {**_COMMON, "local_attention": 6, "cls_token_id": 1, "sep_token_id": 2},
    "AlbertForMaskedLM": {**_COMMON, "embedding_size": 16},
    "T5ForConditionalGeneration": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
}  # fmt: skip
PROJECTIONS = {
    "GPT2LMHeadModel": "transformer.h.{}.attn.c_proj",
    "LlamaForCausalLM": "model.layers.{}.self_attn.o_proj",
    "Gemma2ForCausalLM": "model.layers.{}.self_attn.o_proj",
    "GPTNeoXForCausalLM": "gpt_neox.layers.{}.attention.dense",
}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """`tiny("LlamaForCausalLM")`: random weights, biases and norms, float64."""

    def make(name: str, **changes: Any) -> Any:
        torch.manual_seed(0)
        kind = getattr(transformers, name)
        model = kind(kind.config_class(**{**CONFIGS[name], **changes})).eval().double()
        model.config._experts_implementation = "eager"  # the other one has no float64
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name and "weight" in name else 0.0, std=0.3)
        return model.requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def projections() -> Callable[[str, Any], list[Any]]:
    """The modules that map a layer's concatenated heads to the residual stream."""
    return lambda name, model: [model.get_submodule(PROJECTIONS[name].format(layer)) for layer in range(2)]

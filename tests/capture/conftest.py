"""Tiny random models of many architectures, and the attention matrices that `eager` computes."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

WIDTH = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
COMMON = {**WIDTH, **SPECIAL, "vocab_size": 64, "max_position_embeddings": 64}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
PAIR = {**SPECIAL, "vocab_size": 64, "decoder_start_token_id": 0}

CONFIGS: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 64, "n_positions": 64},
    "LlamaForCausalLM": GROUPED,
    "MistralForCausalLM": {**GROUPED, "sliding_window": 5},
    "Gemma2ForCausalLM": {**GROUPED, "sliding_window": 5, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "Gemma3ForCausalLM": {**GROUPED, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "GptOssForCausalLM": {**GROUPED, "sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Llama4ForCausalLM": {
        **GROUPED, "attention_chunk_size": 4, "num_local_experts": 2, "intermediate_size_mlp": 48,
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "DeepseekV3ForCausalLM": {
        **COMMON, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
        "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    },
    "OPTForCausalLM": {
        "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32,
    },
    "BertForMaskedLM": COMMON,
    "RobertaForMaskedLM": COMMON,
    "AlbertForMaskedLM": {**COMMON, "embedding_size": 16},
    "ModernBertForMaskedLM": {
        **COMMON, "local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2,
    },
    "T5ForConditionalGeneration": {**PAIR, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "BartForConditionalGeneration": {
        **PAIR, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    },
    "BloomForCausalLM": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64},
    "FalconForCausalLM": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64},
    "GPTJForCausalLM": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64, "rotary_dim": 4},
    "DebertaV2ForMaskedLM": COMMON,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """`tiny("LlamaForCausalLM", sliding_window=3)`: a random model with attention that is far from uniform."""

    def make(name: str, **changes: Any) -> Any:
        torch.manual_seed(0)
        kind = getattr(transformers, name)
        model = kind(kind.config_class(**{**CONFIGS[name], **changes})).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1 or parameter.shape == (4,):
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    return make


@pytest.fixture(scope="session")
def eager_matrices() -> Callable[..., dict[str, list[Tensor]]]:
    """The model's attention matrices by kind, [B, H, Nq, Nk], from its own `eager` attention."""

    def compute(model: Any, **inputs: Any) -> dict[str, list[Tensor]]:
        other = copy.deepcopy(model)
        other.set_attn_implementation("eager")
        with torch.no_grad():
            out = other(**inputs, output_attentions=True)
        if model.config.is_encoder_decoder:
            found = {"encoder": out.encoder_attentions, "self": out.decoder_attentions, "cross": out.cross_attentions}
        else:
            found = {"self": out.attentions}
        return {kind: [a.double() for a in layers] for kind, layers in found.items()}

    return compute


@pytest.fixture(scope="session")
def inputs_folder() -> Path:
    """Checkpoints trained by others; absent on most machines."""
    default = Path(__file__).resolve().parents[3] / "shared" / "inputs"
    folder = Path(os.environ.get("ATTNLAB_INPUTS", default))
    if not folder.is_dir():
        pytest.skip("the folder of real checkpoints is absent; set ATTNLAB_INPUTS")
    return folder

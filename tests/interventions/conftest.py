"""Tiny float64 models, and the same models computed densely by hand with an edit at the place of each intervention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from attnlab_kernels import Emit, Emitted
from torch import Tensor

_WIDTH = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_COMMON = {**_WIDTH, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 64}
_GROUPED = {**_COMMON, "max_position_embeddings": 64, "num_key_value_heads": 2, "head_dim": 8}
_CONFIGS: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 64, "n_positions": 64},
    "LlamaForCausalLM": _GROUPED,
    "MistralForCausalLM": {**_GROUPED, "sliding_window": 7},
    "Gemma2ForCausalLM": {**_GROUPED, "sliding_window": 7, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "GptOssForCausalLM": {**_GROUPED, "sliding_window": 7, "num_local_experts": 4, "num_experts_per_tok": 2},
    "BertForMaskedLM": {**_COMMON, "max_position_embeddings": 64},
    "T5ForConditionalGeneration": {
        "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "pad_token_id": 0,
        "eos_token_id": 1, "decoder_start_token_id": 0,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """`tiny("LlamaForCausalLM")`: a random float64 model with attention that is far from uniform."""

    def make(name: str, **changes: Any) -> Any:
        torch.manual_seed(0)
        kind = getattr(transformers, name)
        model = kind(kind.config_class(**{**_CONFIGS[name], **changes})).eval().double()
        model.config._experts_implementation = "eager"  # the other one has no float64
        for parameter in model.parameters():
            if parameter.dim() > 1 or parameter.shape == (4,):
                torch.nn.init.normal_(parameter, std=0.3)
        return model.requires_grad_(False)

    return make


def _unchanged(layer: int, x: Tensor) -> Tensor:
    return x


@dataclass
class Edit:
    """What is done to layer `layer` of a dense computation; every function takes the layer and its tensor.

    Attributes:
        q, k: [B, Hq, N, D]. logits, pattern: [B, Hq, Nq, Nk] (a learned sink's column is cut off the pattern). z.
        hide: adds hidden entries; takes the layer and [B, Hq, Nq, Nk] booleans of visible ones.
        patterns, visible: what was computed, by layer.
    """

    q: Callable[[int, Tensor], Tensor] = _unchanged
    k: Callable[[int, Tensor], Tensor] = _unchanged
    logits: Callable[[int, Tensor], Tensor] = _unchanged
    hide: Callable[[int, Tensor], Tensor] = _unchanged
    pattern: Callable[[int, Tensor], Tensor] = _unchanged
    z: Callable[[int, Tensor], Tensor] = _unchanged
    sinks: Callable[[int, Tensor], Tensor] = _unchanged
    patterns: dict[int, Tensor] = field(default_factory=dict)
    visible: dict[int, Tensor] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float = 1.0, **more: Any
    ) -> tuple[Tensor, None]:
        layer, group = module.layer_idx, q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        s = self.q(layer, q) @ self.k(layer, k).mT * scaling
        if more.get("softcap") is not None:
            s = more["softcap"] * torch.tanh(s / more["softcap"])
        s = self.logits(layer, s)
        seen = torch.ones_like(s, dtype=torch.bool) if mask is None else (mask > -1e30).expand_as(s)
        seen = self.hide(layer, seen)
        s = s.masked_fill(~seen, -torch.inf)
        n_keys = s.shape[-1]
        if more.get("s_aux") is not None:
            sink = self.sinks(layer, more["s_aux"][None, :, None, None].expand(*s.shape[:3], 1))
            s = torch.cat([s, sink.to(s.dtype)], -1)
        a = torch.softmax(s, -1).nan_to_num(0)[..., :n_keys]
        a = self.pattern(layer, a)
        z = self.z(layer, a @ v)
        self.patterns[layer], self.visible[layer], self.outputs[layer] = a, seen, z
        return z.transpose(1, 2).contiguous(), None

    def run(self, model: Any, **inputs: Any) -> Tensor:
        """The edited model's logits."""
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import eager_mask

        AttentionInterface.register("dense_reference", self.attend)
        AttentionMaskInterface.register("dense_reference", eager_mask)
        own = model.config._attn_implementation
        model.set_attn_implementation("dense_reference")
        try:
            return model(**inputs).logits
        finally:
            model.set_attn_implementation(own)


EVERYTHING = Emit(
    entropy=True, max_probability=True, argmax=True, collision=True, key_sum=True, key_square=True, key_max=True,
    pool=[4, 3], offsets=([0, 2, 30], [-30, 0, 1, 5]), top_k=3, gather=torch.arange(36).view(2, 18, 1)[:, :12] % 5,
    rows=torch.tensor([11, -1, 4]), columns=torch.tensor([0, 3]), key_probes=torch.arange(24.0).view(12, 2).double(),
    query_probes=torch.arange(24.0).view(12, 2).sin().double(),
)  # fmt: skip
"""Every statistic of 2 sequences of 12 tokens; `head_gram` apart, which only heads that are edited alike have."""


def check_statistics(emitted: Emitted, a: Tensor, seen: Tensor, counted: Tensor, learned_sink: bool = False) -> None:
    """Hold every statistic against a pattern [B, H, 12, 12] that was formed."""
    n = a.shape[-1]
    rows = counted[:, None, :, None]
    read, readable = a * rows, seen & rows
    share = torch.special.entr((1 - a.sum(-1)).clamp(min=0)) if learned_sink else 0
    exact = {
        "entropy": torch.special.entr(a).sum(-1) + share,
        "max_probability": a.max(-1).values,
        "collision": a.square().sum(-1),
        "key_sum": read.sum(-2),
        "key_square": read.square().sum(-2),
        "key_max": read.max(-2).values,
        "key_probes": a @ EVERYTHING.key_probes,
        "query_probes": read.mT @ EVERYTHING.query_probes,
        "columns": a[..., [0, 3]],
        "top_k_values": a.topk(3, -1).values,
        "gathered": a.gather(-1, EVERYTHING.gather[:, None].expand(-1, a.shape[1], -1, -1)),
    }
    for name, value in exact.items():
        found = getattr(emitted, name)
        where = rows if found.dim() == 4 else rows[..., 0]
        over_keys = name in ("key_sum", "key_square", "key_max", "query_probes")
        where = torch.ones_like(where) if over_keys else where
        assert torch.allclose(found * where, value * where, atol=1e-9), name
    kept = a[..., [11, 4], :] * counted[:, [11, 4]][:, None, :, None]
    assert torch.allclose(emitted.rows[:, :, [0, 2]] * counted[:, [11, 4]][:, None, :, None], kept, atol=1e-9)
    assert emitted.rows[:, :, 1].abs().max() == 0
    at = emitted.argmax.clamp(min=0)[..., None]
    assert torch.allclose(a.gather(-1, at)[..., 0] * rows[..., 0], exact["max_probability"] * rows[..., 0], atol=1e-12)
    at, there = emitted.top_k_keys.clamp(min=0), rows & (emitted.top_k_keys >= 0)
    assert torch.allclose(a.gather(-1, at) * there, emitted.top_k_values * rows, atol=1e-9)
    for size, pooled in zip((4, 3), emitted.pooled, strict=True):
        blocks = (n // size, size, n // size, size)
        total = read.unflatten(-1, blocks[2:]).unflatten(-3, blocks[:2]).sum((-1, -3))
        number = readable.unflatten(-1, blocks[2:]).unflatten(-3, blocks[:2]).sum((-1, -3))
        assert torch.allclose(pooled, total / number.clamp(min=1), atol=1e-9)
    distance = torch.arange(n)[:, None] - torch.arange(n)
    for edges, profile in zip(EVERYTHING.offsets, emitted.offsets, strict=True):
        for bin_, (low, high) in enumerate(pairwise(edges)):
            inside = (distance >= low) & (distance < high)
            assert torch.allclose(profile[..., bin_], (read * inside).sum((-1, -2)), atol=1e-9)


@pytest.fixture(scope="session")
def dense() -> type[Edit]:
    """The dense computation."""
    return Edit


@pytest.fixture(scope="session")
def everything() -> Emit:
    """Every statistic."""
    return EVERYTHING


@pytest.fixture(scope="session")
def statistics_agree() -> Callable[..., None]:
    """Assert that statistics are those of a pattern."""
    return check_statistics

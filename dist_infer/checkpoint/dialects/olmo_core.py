"""OLMo-core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from dist_infer.checkpoint.dialects.table import Place, Table, TableDialect

_BLOCK = "blocks.{layer}"
_FUSED = Place(f"{_BLOCK}.attention.w_qkv", parts=("q_proj", "k_proj", "v_proj"))


class OlmoCore(TableDialect):
    """Two halves, unless the configuration says `complex`. What its two norms normalize depends on the kind of block."""

    name = "olmo_core"
    table: ClassVar[Table] = {
        "model.embed_tokens": "embeddings",
        "model.norm": "lm_head.norm",
        "lm_head": "lm_head.w_out",
        "model.layers.{layer}.self_attn.q_proj": (f"{_BLOCK}.attention.w_q", _FUSED),
        "model.layers.{layer}.self_attn.k_proj": (f"{_BLOCK}.attention.w_k", _FUSED),
        "model.layers.{layer}.self_attn.v_proj": (f"{_BLOCK}.attention.w_v", _FUSED),
        "model.layers.{layer}.self_attn.o_proj": f"{_BLOCK}.attention.w_out",
        "model.layers.{layer}.self_attn.q_norm": f"{_BLOCK}.attention.q_norm",
        "model.layers.{layer}.self_attn.k_norm": f"{_BLOCK}.attention.k_norm",
        "model.layers.{layer}.mlp.gate_proj": f"{_BLOCK}.feed_forward.w1",
        "model.layers.{layer}.mlp.up_proj": f"{_BLOCK}.feed_forward.w3",
        "model.layers.{layer}.mlp.down_proj": f"{_BLOCK}.feed_forward.w2",
    }
    norms: ClassVar[Mapping[str, Table]] = {
        "pre": {
            "model.layers.{layer}.input_layernorm": f"{_BLOCK}.attention_norm",
            "model.layers.{layer}.post_attention_layernorm": f"{_BLOCK}.feed_forward_norm",
        },
        "post": {
            "model.layers.{layer}.post_attention_layernorm": f"{_BLOCK}.attention_norm",
            "model.layers.{layer}.post_feedforward_layernorm": f"{_BLOCK}.feed_forward_norm",
        },
        "both": {
            "model.layers.{layer}.input_layernorm": f"{_BLOCK}.attention_norm",
            "model.layers.{layer}.post_attention_layernorm": f"{_BLOCK}.post_attention_norm",
            "model.layers.{layer}.pre_feedforward_layernorm": f"{_BLOCK}.feed_forward_norm",
            "model.layers.{layer}.post_feedforward_layernorm": f"{_BLOCK}.post_feed_forward_norm",
        },
    }

"""litgpt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from dist_infer.checkpoint.dialects.table import Place, Table, TableDialect

_BLOCK = "transformer.h.{layer}"
_PARTS = ("q_proj", "k_proj", "v_proj")
_QKV = (Place(f"{_BLOCK}.attn.qkv", parts=_PARTS), Place(f"{_BLOCK}.attn.attn", parts=_PARTS, grouped=True))


class LitGPT(TableDialect):
    """Q, K and V are one matrix; until 2024 it was called `attn` and interleaved by KV group."""

    name = "litgpt"
    table: ClassVar[Table] = {
        "model.embed_tokens": "transformer.wte",
        "model.norm": "transformer.ln_f",
        "lm_head": "lm_head",
        "model.layers.{layer}.self_attn.q_proj": _QKV,
        "model.layers.{layer}.self_attn.k_proj": _QKV,
        "model.layers.{layer}.self_attn.v_proj": _QKV,
        "model.layers.{layer}.self_attn.o_proj": f"{_BLOCK}.attn.proj",
        "model.layers.{layer}.self_attn.q_norm": f"{_BLOCK}.attn.norm_q",
        "model.layers.{layer}.self_attn.k_norm": f"{_BLOCK}.attn.norm_k",
        "model.layers.{layer}.mlp.gate_proj": f"{_BLOCK}.mlp.fc_1",
        "model.layers.{layer}.mlp.up_proj": (f"{_BLOCK}.mlp.fc_2", f"{_BLOCK}.mlp.fc"),
        "model.layers.{layer}.mlp.down_proj": f"{_BLOCK}.mlp.proj",
        "model.layers.{layer}.mlp.gate": f"{_BLOCK}.mlp.gate",
        "model.layers.{layer}.mlp.experts.{expert}.gate_proj": f"{_BLOCK}.mlp.experts.{{expert}}.fc_1",
        "model.layers.{layer}.mlp.experts.{expert}.up_proj": f"{_BLOCK}.mlp.experts.{{expert}}.fc_2",
        "model.layers.{layer}.mlp.experts.{expert}.down_proj": f"{_BLOCK}.mlp.experts.{{expert}}.proj",
    }
    norms: ClassVar[Mapping[str, Table]] = {
        "pre": {
            "model.layers.{layer}.input_layernorm": f"{_BLOCK}.norm_1",
            "model.layers.{layer}.post_attention_layernorm": f"{_BLOCK}.norm_2",
        },
        "post": {
            "model.layers.{layer}.post_attention_layernorm": f"{_BLOCK}.post_attention_norm",
            "model.layers.{layer}.post_feedforward_layernorm": f"{_BLOCK}.post_mlp_norm",
        },
        "both": {
            "model.layers.{layer}.input_layernorm": f"{_BLOCK}.norm_1",
            "model.layers.{layer}.post_attention_layernorm": f"{_BLOCK}.post_attention_norm",
            "model.layers.{layer}.pre_feedforward_layernorm": f"{_BLOCK}.norm_2",
            "model.layers.{layer}.post_feedforward_layernorm": f"{_BLOCK}.post_mlp_norm",
        },
    }

"""GPT-NeoX and Pythia."""

from __future__ import annotations

from typing import Any

from dist_infer.model.config import ModelConfig
from dist_infer.model.families import split
from dist_infer.model.stored import Stored

LANDMARKS = ("gpt_neox.embed_in.weight", "gpt_neox.layers.0.attention.dense.weight")

_NAMES = {
    "model.embed_tokens": "gpt_neox.embed_in",
    "model.norm": "gpt_neox.final_layer_norm",
    "lm_head": "embed_out",
    "self_attn.o_proj": "attention.dense",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}
_FUSED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def traits(config: Any) -> dict[str, Any]:
    """What sets GPT-NeoX apart: layer norms, biases everywhere, an mlp without a gate, mostly beside the attention."""
    return {
        "kv_heads": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "norm_eps": config.layer_norm_eps,
        "qkv_bias": config.attention_bias,
        "output_bias": config.attention_bias,
        "mlp_bias": True,
        "norm": "layer",
        "parallel_residual": config.use_parallel_residual,
        "gated_mlp": False,
    }


def stored(name: str, config: ModelConfig) -> Stored:
    """Q, K and V are one matrix, whose rows are those of the first head's query, key and value, then the next head's."""
    layer, part, kind = split(name)
    place = "" if layer is None else f"gpt_neox.layers.{layer}."
    if part not in _FUSED:
        return Stored(f"{place}{_NAMES.get(part, part)}.{kind}")
    size, rows = config.head_dim, 3 * config.heads * config.head_dim
    shape = (rows, config.hidden_size) if kind == "weight" else (rows,)
    tensor = f"{place}attention.query_key_value.{kind}"
    return Stored(tensor, shape=shape, offset=_FUSED.index(part) * size, group=size, stride=3 * size)

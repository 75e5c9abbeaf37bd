"""GPT-2."""

from __future__ import annotations

from typing import Any

from dist_infer.model.config import ModelConfig
from dist_infer.model.families import split
from dist_infer.model.stored import Stored

LANDMARKS = ("transformer.wte.weight", "transformer.h.0.attn.c_proj.weight")

_NAMES = {
    "model.embed_tokens": "transformer.wte",
    "model.embed_positions": "transformer.wpe",
    "model.norm": "transformer.ln_f",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.q_proj": "attn.c_attn",
    "self_attn.k_proj": "attn.c_attn",
    "self_attn.v_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
_FUSED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def traits(config: Any) -> dict[str, Any]:
    """What sets GPT-2 apart: layer norms, biases everywhere, a table of positions, an mlp without a gate."""
    return {
        "ffn_size": config.n_inner or 4 * config.hidden_size,
        "kv_heads": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "norm_eps": config.layer_norm_epsilon,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "norm": "layer",
        "activation": config.activation_function,
        "gated_mlp": False,
        "learned_positions": True,
        "attention_scale": None if config.scale_attn_weights else 1.0,
    }


def stored(name: str, config: ModelConfig) -> Stored:
    """Matrices of layers are stored [inputs, outputs]; Q, K and V are one."""
    layer, part, kind = split(name)
    tensor = f"{_NAMES.get(part, part)}.{kind}"
    if layer is None:
        return Stored(tensor)
    tensor = f"transformer.h.{layer}.{tensor}"
    if part.endswith("norm"):
        return Stored(tensor)
    hidden, ffn = config.hidden_size, config.ffn_size
    inputs, outputs = {"mlp.up_proj": (hidden, ffn), "mlp.down_proj": (ffn, hidden)}.get(part, (hidden, hidden))
    offset = 0
    if part in _FUSED:
        offset, outputs = _FUSED.index(part) * hidden, 3 * hidden
    if kind == "bias":
        return Stored(tensor, shape=(outputs,), offset=offset)
    return Stored(tensor, shape=(inputs, outputs), offset=offset, transposed=True)

"""torchtitan, of today and older: names moved, the meaning did not."""

from __future__ import annotations

from typing import ClassVar

from dist_infer.checkpoint.dialects.table import Place, Table, TableDialect
from dist_infer.model.config import ModelConfig

_LAYER = "layers.{layer}"
_FUSED = Place(f"{_LAYER}.attention.qkv_linear.wqkv", parts=("q_proj", "k_proj", "v_proj"), grouped=True)


class Torchtitan(TableDialect):
    """Rotary pairs lie side by side, except in Qwen3. Meta's own checkpoints of Llama have its older names."""

    name = "torchtitan"
    rotary = "interleaved"
    table: ClassVar[Table] = {
        "model.embed_tokens": "tok_embeddings",
        "model.norm": "norm",
        "lm_head": ("lm_head", "output"),
        "model.layers.{layer}.input_layernorm": f"{_LAYER}.attention_norm",
        "model.layers.{layer}.self_attn.q_proj": (f"{_LAYER}.attention.qkv_linear.wq", f"{_LAYER}.attention.wq", _FUSED),
        "model.layers.{layer}.self_attn.k_proj": (f"{_LAYER}.attention.qkv_linear.wk", f"{_LAYER}.attention.wk", _FUSED),
        "model.layers.{layer}.self_attn.v_proj": (f"{_LAYER}.attention.qkv_linear.wv", f"{_LAYER}.attention.wv", _FUSED),
        "model.layers.{layer}.self_attn.o_proj": f"{_LAYER}.attention.wo",
        "model.layers.{layer}.self_attn.q_norm": f"{_LAYER}.attention.q_norm",
        "model.layers.{layer}.self_attn.k_norm": f"{_LAYER}.attention.k_norm",
        "model.layers.{layer}.post_attention_layernorm": f"{_LAYER}.ffn_norm",
        "model.layers.{layer}.mlp.gate_proj": f"{_LAYER}.feed_forward.w1",
        "model.layers.{layer}.mlp.up_proj": f"{_LAYER}.feed_forward.w3",
        "model.layers.{layer}.mlp.down_proj": f"{_LAYER}.feed_forward.w2",
    }

    def interleaved(self, config: ModelConfig) -> bool:
        """Qwen3's are not."""
        return super().interleaved(config) and config.family != "qwen3"

"""torchtune."""

from __future__ import annotations

from typing import ClassVar

from dist_infer.checkpoint.dialects.table import Table, TableDialect
from dist_infer.model.config import ModelConfig

_LAYER = "layers.{layer}"


class Torchtune(TableDialect):
    """Rotary pairs lie side by side, except in Qwen's models; weights of norms are called `scale`."""

    name = "torchtune"
    rotary = "interleaved"
    table: ClassVar[Table] = {
        "model.embed_tokens": "tok_embeddings",
        "model.norm.weight": "norm.scale",
        "lm_head": "output",
        "model.layers.{layer}.input_layernorm.weight": f"{_LAYER}.sa_norm.scale",
        "model.layers.{layer}.self_attn.q_proj": f"{_LAYER}.attn.q_proj",
        "model.layers.{layer}.self_attn.k_proj": f"{_LAYER}.attn.k_proj",
        "model.layers.{layer}.self_attn.v_proj": f"{_LAYER}.attn.v_proj",
        "model.layers.{layer}.self_attn.o_proj": f"{_LAYER}.attn.output_proj",
        "model.layers.{layer}.self_attn.q_norm.weight": f"{_LAYER}.attn.q_norm.scale",
        "model.layers.{layer}.self_attn.k_norm.weight": f"{_LAYER}.attn.k_norm.scale",
        "model.layers.{layer}.post_attention_layernorm.weight": f"{_LAYER}.mlp_norm.scale",
        "model.layers.{layer}.mlp.gate_proj": f"{_LAYER}.mlp.w1",
        "model.layers.{layer}.mlp.up_proj": f"{_LAYER}.mlp.w3",
        "model.layers.{layer}.mlp.down_proj": f"{_LAYER}.mlp.w2",
    }

    def interleaved(self, config: ModelConfig) -> bool:
        """Qwen's are not."""
        return super().interleaved(config) and config.family not in ("qwen2", "qwen3")

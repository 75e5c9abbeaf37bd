"""KempnerForge."""

from __future__ import annotations

from dist_infer.checkpoint.dialects.dialect import Dialect, translate
from dist_infer.model.config import ModelConfig
from dist_infer.model.stored import Stored

_TABLE = {
    "model.embed_tokens": "token_embedding.embedding",
    "model.norm": "norm",
    "lm_head": "output_head.proj",
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.q_proj",
    "self_attn.k_proj": "attention.k_proj",
    "self_attn.v_proj": "attention.v_proj",
    "self_attn.o_proj": "attention.o_proj",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "post_attention_layernorm": "mlp_norm",
}


class KempnerForge(Dialect):
    """Its rotary convention is Hugging Face's (two halves)."""

    name = "kempnerforge"
    embedding = "token_embedding.embedding.weight"
    witness = "layers.0.attention.q_proj.weight"

    def map(self, name: str, config: ModelConfig) -> Stored:
        """The translated name; rows lie as ours."""
        return Stored(self.prefix + translate(name, _TABLE))

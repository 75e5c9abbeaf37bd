"""torchtitan, of today and older: names moved, the meaning did not."""

from __future__ import annotations

from dist_infer.checkpoint.dialects.dialect import Dialect, translate
from dist_infer.model.config import ModelConfig
from dist_infer.model.stored import Stored

_TABLE = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "lm_head",
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.qkv_linear.wq",
    "self_attn.k_proj": "attention.qkv_linear.wk",
    "self_attn.v_proj": "attention.qkv_linear.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
_INTERLEAVED = (".self_attn.q_proj", ".self_attn.k_proj")


class Torchtitan(Dialect):
    """Rotary pairs lie side by side, except in Qwen3."""

    name = "torchtitan"
    embedding = "tok_embeddings.weight"
    witness = "layers.0.attention.wo.weight"

    def map(self, name: str, config: ModelConfig) -> Stored:
        """The translated name, or the older one where the checkpoint has that."""
        stored = self.prefix + translate(name, _TABLE)
        if stored not in self.names:
            older = stored.replace("attention.qkv_linear.", "attention.") if "qkv_linear" in stored else stored.replace("lm_head", "output")
            stored = older if older in self.names else stored
        interleaved = config.family != "qwen3" and name.rpartition(".")[0].endswith(_INTERLEAVED)
        return Stored(stored, pairs=config.head_dim if interleaved else 0)

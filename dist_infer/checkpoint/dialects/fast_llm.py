"""Fast-LLM's own format (`fast_llm`); names end in the shard that holds the weights."""

from __future__ import annotations

from typing import ClassVar

from dist_infer.checkpoint.dialects.table import Place, Table, TableDialect

_BLOCK = "decoder.{layer}"
_SHARD = "{kind}/weights"
_KEYS_VALUES = Place(f"{_BLOCK}.mixer.key_value.{_SHARD}", parts=("k_proj", "v_proj"))
_GATE_UP = Place(f"{_BLOCK}.mlp.layer_1.{_SHARD}", parts=("gate_proj", "up_proj"))


class FastLLM(TableDialect):
    """K and V are one matrix, as are gate and up; down is stored [inputs, outputs]."""

    name = "fast_llm"
    table: ClassVar[Table] = {
        "model.embed_tokens.weight": "embeddings.word_embeddings_weight/weights",
        "model.norm": f"head.final_norm.{_SHARD}",
        "lm_head.weight": "head.output_weights/weights",
        "model.layers.{layer}.input_layernorm": f"{_BLOCK}.norm_1.{_SHARD}",
        "model.layers.{layer}.self_attn.q_proj": f"{_BLOCK}.mixer.query.{_SHARD}",
        "model.layers.{layer}.self_attn.k_proj": _KEYS_VALUES,
        "model.layers.{layer}.self_attn.v_proj": _KEYS_VALUES,
        "model.layers.{layer}.self_attn.o_proj": f"{_BLOCK}.mixer.dense.{_SHARD}",
        "model.layers.{layer}.self_attn.q_norm": f"{_BLOCK}.mixer.query_norm.{_SHARD}",
        "model.layers.{layer}.self_attn.k_norm": f"{_BLOCK}.mixer.key_norm.{_SHARD}",
        "model.layers.{layer}.post_attention_layernorm": f"{_BLOCK}.norm_2.{_SHARD}",
        "model.layers.{layer}.mlp.gate_proj": _GATE_UP,
        "model.layers.{layer}.mlp.up_proj": _GATE_UP,
        "model.layers.{layer}.mlp.down_proj": Place(f"{_BLOCK}.mlp.layer_2.{_SHARD}", transposed=True),
    }

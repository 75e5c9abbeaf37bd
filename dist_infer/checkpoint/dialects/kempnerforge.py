"""KempnerForge."""

from __future__ import annotations

from typing import ClassVar

from dist_infer.checkpoint.dialects.table import Place, Table, TableDialect

_LAYER = "layers.{layer}"
_MLP = "layers.{layer}.mlp"


def _expert(projection: str) -> tuple[str | Place, ...]:
    """Experts one by one, or all in one pack [experts, inputs, outputs] (`moe_packed_experts`)."""
    pack = {"gate_proj": "gate_w", "up_proj": "up_w", "down_proj": "down_w"}[projection]
    return (
        f"{_MLP}.experts.{{expert}}.{projection}.weight",
        Place(f"{_MLP}.{pack}", packed=True, transposed=True),
    )


class KempnerForge(TableDialect):
    """Its rotary convention is Hugging Face's (two halves)."""

    name = "kempnerforge"
    table: ClassVar[Table] = {
        "model.embed_tokens": "token_embedding.embedding",
        "model.norm": "norm",
        "lm_head": "output_head.proj",
        "model.layers.{layer}.input_layernorm": f"{_LAYER}.attention_norm",
        "model.layers.{layer}.self_attn.q_proj": f"{_LAYER}.attention.q_proj",
        "model.layers.{layer}.self_attn.k_proj": f"{_LAYER}.attention.k_proj",
        "model.layers.{layer}.self_attn.v_proj": f"{_LAYER}.attention.v_proj",
        "model.layers.{layer}.self_attn.o_proj": f"{_LAYER}.attention.o_proj",
        "model.layers.{layer}.self_attn.q_norm": f"{_LAYER}.attention.q_norm",
        "model.layers.{layer}.self_attn.k_norm": f"{_LAYER}.attention.k_norm",
        "model.layers.{layer}.post_attention_layernorm": f"{_LAYER}.mlp_norm",
        "model.layers.{layer}.mlp.gate_proj": f"{_MLP}.gate_proj",
        "model.layers.{layer}.mlp.up_proj": f"{_MLP}.up_proj",
        "model.layers.{layer}.mlp.down_proj": f"{_MLP}.down_proj",
        "model.layers.{layer}.mlp.gate": f"{_MLP}.router.gate",
        "model.layers.{layer}.mlp.gate.e_score_correction_bias": f"{_MLP}.router.expert_bias",
        "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight": _expert("gate_proj"),
        "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": _expert("up_proj"),
        "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight": _expert("down_proj"),
        "model.layers.{layer}.mlp.shared_expert.gate_proj": f"{_MLP}.shared_expert.gate_proj",
        "model.layers.{layer}.mlp.shared_expert.up_proj": f"{_MLP}.shared_expert.up_proj",
        "model.layers.{layer}.mlp.shared_expert.down_proj": f"{_MLP}.shared_expert.down_proj",
    }
    ignored = (f"{_MLP}.router.expert_ema",)  # how often each expert was chosen; training alone reads it

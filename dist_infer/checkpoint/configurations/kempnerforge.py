"""The [model] section of a KempnerForge run's TOML."""

from __future__ import annotations

import math
from typing import Any

from dist_infer.checkpoint.configurations.document import choose, only
from dist_infer.checkpoint.configurations.shapes import Shapes
from dist_infer.model.config import ExpertsConfig, ModelConfig

_ROUTERS = {"softmax_topk": "softmax", "sigmoid_topk": "sigmoid"}


def recognizes(data: dict[str, Any]) -> bool:
    """It has a section of the model; torchtitan's has one too, which names a flavor instead of sizes."""
    return isinstance(data.get("model"), dict) and "flavor" not in data["model"]


def read(data: dict[str, Any], shapes: Shapes) -> ModelConfig:
    """KempnerForge's defaults where the run's file is silent.

    A capacity of experts drops tokens by how many others are beside them; tokens of a request must not depend on that,
    so it is not read (a token decoded alone is never dropped).
    """
    model = data["model"]
    only(model, "model.", model_type="transformer")
    activation = choose({"silu": "silu", "gelu": "gelu", "relu": "relu"}, "model.activation", model.get("activation", "silu"))
    hidden, heads, layers = model.get("dim", 4096), model.get("n_heads", 32), model.get("n_layers", 32)
    ffn = model.get("ffn_hidden_dim")
    if ffn is None:
        ffn = 256 * math.ceil(int(4 * hidden * (2 / 3) * model.get("ffn_dim_multiplier", 1.0)) / 256)
    return ModelConfig(
        family="llama",
        vocab_size=model.get("vocab_size", 32000),
        hidden_size=hidden,
        ffn_size=ffn,
        layers=layers,
        heads=heads,
        kv_heads=model.get("n_kv_heads") or heads,
        head_dim=hidden // heads,
        norm_eps=model.get("norm_eps", 1e-5),
        max_position=model.get("max_seq_len", 2048),
        rope={"rope_type": "default", "rope_theta": float(model.get("rope_theta", 10000.0))},
        tied_head=model.get("tie_embeddings", False),
        qk_norm="head" if model.get("qk_norm", False) else None,
        qk_norm_eps=1e-5,  # whatever norm_eps says
        norm=choose({"rmsnorm": "rms", "layernorm": "layer"}, "model.norm_type", model.get("norm_type", "rmsnorm")),
        activation=activation,
        gated_mlp=activation == "silu",
        experts=_experts(model, ffn, layers) if model.get("num_experts", 0) else None,
    )


def _experts(model: dict[str, Any], ffn: int, layers: int) -> ExpertsConfig:
    """Every `moe_frequency`-th layer has experts; all shared ones together are one."""
    size = max(16, 16 * round(int(ffn * model.get("moe_expert_ffn_multiplier", 1.0)) / 16))
    frequency = model.get("moe_frequency", 1)
    scoring = choose(_ROUTERS, "model.moe_router", model.get("moe_router", "softmax_topk"))
    return ExpertsConfig(
        count=model["num_experts"],
        chosen=model.get("moe_top_k", 2),
        ffn_size=size,
        layers=tuple(layer for layer in range(layers) if (layer + 1) % frequency == 0),
        shared_ffn_size=size if model.get("moe_shared_experts", 0) else 0,
        scoring=scoring,
        score_bias=scoring == "sigmoid",
        bias_in_score=scoring == "sigmoid",
    )

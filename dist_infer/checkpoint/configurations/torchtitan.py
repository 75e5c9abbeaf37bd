"""The JSON that torchtitan writes when asked to (`debug.save_config_file`)."""

from __future__ import annotations

from typing import Any

from dist_infer.checkpoint.configurations.document import choose
from dist_infer.checkpoint.configurations.shapes import Shapes
from dist_infer.model.config import ModelConfig


def recognizes(data: dict[str, Any]) -> bool:
    """It has the specification of the model as it was built; older ones name a flavor only."""
    return "model_spec" in data


def read(data: dict[str, Any], shapes: Shapes) -> ModelConfig:
    """The model as torchtitan built it, layer by layer; layers must be alike."""
    spec = data["model_spec"]
    family = choose({"llama3": "llama", "qwen3": "qwen3"}, "model_spec.name", spec["name"])
    model = spec["model"]
    layers = [_layer(layer, model["dim"]) for layer in model["layers"]]
    if any(layer != layers[0] for layer in layers):
        raise ValueError("layers of different shapes are not supported")
    epsilons = {model["norm"]["eps"]} | {layer[norm]["eps"] for layer in model["layers"] for norm in ("attention_norm", "ffn_norm")}
    head_epsilons = {layer["attention"]["qk_norm"]["eps"] for layer in model["layers"] if layer["attention"]["qk_norm"]}
    if len(epsilons) > 1 or len(head_epsilons) > 1:
        raise ValueError(f"layers with different norm eps {sorted(epsilons | head_epsilons)} are not supported")
    rope = model["layers"][0]["attention"]["rope"]
    return ModelConfig(
        family=family,
        vocab_size=model["vocab_size"],
        hidden_size=model["dim"],
        layers=len(layers),
        norm_eps=epsilons.pop(),
        qk_norm_eps=next(iter(head_epsilons), None),
        max_position=rope["max_context_length"],
        rope=_rope(rope),
        tied_head=model["enable_weight_tying"],
        **layers[0],
    )


def _layer(layer: dict[str, Any], hidden: int) -> dict[str, Any]:
    """What ModelConfig says of one layer."""
    if layer.get("moe") is not None:
        raise ValueError("mixtures of experts are not supported")
    attention, ffn = layer["attention"], layer["feed_forward"]
    qkv = attention["qkv_linear"]
    return {
        "ffn_size": ffn["w1"]["out_features"],
        "heads": attention["n_heads"],
        "kv_heads": attention["n_kv_heads"] or attention["n_heads"],
        "head_dim": attention["head_dim"] or hidden // attention["n_heads"],
        "qkv_bias": (qkv.get("wqkv") or qkv["wq"])["bias"],
        "output_bias": attention["wo"]["bias"],
        "mlp_bias": ffn["w1"]["bias"],
        "qk_norm": None if attention["qk_norm"] is None else "head",
    }


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Hugging Face's rope_parameters for torchtitan's."""
    theta = {"rope_theta": float(rope["theta"])}
    if choose({"none": False, "llama": True}, "rope scaling", rope["scaling"]):
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return {"rope_type": "llama3", "factor": rope["scaling_factor"], **{name: rope[name] for name in names}, **theta}
    return {"rope_type": "default", **theta}

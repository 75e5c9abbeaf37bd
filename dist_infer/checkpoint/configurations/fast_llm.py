"""The metadata.yaml of a Fast-LLM checkpoint."""

from __future__ import annotations

from typing import Any

from dist_infer.checkpoint.configurations.document import choose, only
from dist_infer.checkpoint.configurations.shapes import UNSTATED_LENGTH, Shapes
from dist_infer.model.config import ModelConfig

_ACTIVATIONS = {"silu": "silu", "gelu": "gelu_pytorch_tanh", "relu": "relu"}


def recognizes(data: dict[str, Any]) -> bool:
    """Its writer says who it is."""
    return "fast_llm_version" in data


def read(data: dict[str, Any], shapes: Shapes) -> ModelConfig:
    """Decoders of one kind of block: attention, and a dense mlp."""
    model = data["config"]["base_model"]
    decoder, embeddings, head = model["decoder"], model.get("embeddings", {}), model.get("head", {})
    only(decoder, "decoder.", type="fixed")
    only(model.get("peft") or {}, "peft.", type="none")
    block = decoder["block"]
    mixer, mlp = block["mixer"], block["mlp"]
    _check(block, mixer, mlp, embeddings, head)
    norm, epsilon = _norm(block["normalization"])
    if _norm(head["normalization"]) != (norm, epsilon):
        raise ValueError("a final normalization other than the blocks' is not supported")
    bias, gated = mixer.get("add_linear_biases", True), mlp.get("gated", False)
    query_norm = mixer.get("query_norm")
    power = mixer.get("softmax_scale_power", 0.5)
    rope, length = _rope(mixer.get("rotary") or {})
    return ModelConfig(
        family="qwen3" if query_norm else "llama",
        vocab_size=embeddings["vocab_size"],
        hidden_size=model["hidden_size"],
        ffn_size=mlp["intermediate_size"],
        layers=decoder["num_blocks"],
        heads=mixer["heads"],
        kv_heads=mixer["head_groups"],
        head_dim=mixer["head_size"],
        norm_eps=epsilon,
        max_position=length,
        rope=rope,
        tied_head=model.get("tied_embedding_weight", False),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=mlp.get("add_linear_biases", True),
        qk_norm="head" if query_norm else None,
        qk_norm_eps=float(query_norm["epsilon"]) if query_norm else None,
        norm=norm,
        activation=choose(_ACTIVATIONS, "mlp.activation", mlp.get("activation") or ("silu" if gated else "gelu")),
        gated_mlp=gated,
        attention_scale=None if power == 0.5 else float(mixer["head_size"]) ** -power,
        logit_softcap=head.get("final_logit_softcap"),
        logit_scale=float(head.get("logits_scale_factor", 1.0)),
        embedding_scale=float(embeddings.get("embedding_scale", 1.0)),
        sliding_windows=(mixer["window_size"],) * decoder["num_blocks"] if mixer.get("window_size") else (),
    )


def _check(block: dict[str, Any], mixer: dict[str, Any], mlp: dict[str, Any], embeddings: dict[str, Any], head: dict[str, Any]) -> None:
    """Refuse what the decoder does not do."""
    only(block, "block.", type="decoder")
    only(mixer, "mixer.", type="attention", causal=True, shared_key_value=False)
    only(mlp, "mlp.", type="mlp")
    only(head, "head.", prediction_heads=1)
    optional = [("mixer", mixer, "value_norm"), ("mlp", mlp, "pre_norm"), ("mlp", mlp, "post_norm")]
    optional += [("block", block, f"{side}_{branch}_normalization") for side in ("pre", "post") for branch in ("mixer", "mlp")]
    for where, section, name in optional:
        if section.get(name) is not None:
            raise ValueError(f"{where}.{name} is not supported")
    for where, section, name in [("block", block, "output_scale"), ("embeddings", embeddings, "position_embeddings")]:
        if (section.get(name) or {}).get("enabled"):
            raise ValueError(f"{where}.{name} is not supported")
    layers = [(mixer, layer) for layer in ("query_layer", "key_layer", "value_layer", "dense_layer")] + [(mlp, "layer_1"), (mlp, "layer_2")]
    for section, layer in layers:
        enabled = ((section.get(layer) or {}).get("bias") or {}).get("enabled")
        if enabled not in (None, section.get("add_linear_biases", True)):
            raise ValueError(f"{layer}.bias.enabled = {enabled!r} other than add_linear_biases is not supported")
    if mixer.get("query_norm") != mixer.get("key_norm"):
        raise ValueError("query_norm and key_norm that differ are not supported")


def _norm(norm: dict[str, Any]) -> tuple[str, float]:
    """Our word for a normalization, and its epsilon."""
    kind = choose({"rms_norm": "rms", "layer_norm": "layer"}, "normalization.type", norm.get("type", "layer_norm"))
    if norm.get("zero_centered"):
        only(norm, "normalization.", type="rms_norm")
        kind = "rms_unit"
    return kind, float(norm.get("epsilon", 1e-5))


def _rope(rotary: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Hugging Face's rope_parameters, and how many tokens a sequence may have, as far as that is said."""
    kind = choose({"default": "default", "llama3": "llama3", "yarn": "yarn"}, "rotary.type", rotary.get("type", "none"))
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": float(rotary.get("theta", 10000))}
    if kind == "default":
        return rope, UNSTATED_LENGTH
    factor, length = float(rotary.get("scale_factor", 8.0)), int(rotary.get("original_context_length", 8192))
    rope |= {"factor": factor, "original_max_position_embeddings": length}
    if kind == "llama3":
        rope["low_freq_factor"] = rotary.get("low_frequency_factor", 1.0)
        rope["high_freq_factor"] = rotary.get("high_frequency_factor", 4.0)
    else:
        rope |= {name: rotary[name] for name in ("attention_factor", "beta_fast", "beta_slow") if rotary.get(name) is not None}
    return rope, int(length * factor)

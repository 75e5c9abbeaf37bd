"""The config.json of an OLMo-core step."""

from __future__ import annotations

from itertools import cycle, islice
from typing import Any

from dist_infer.checkpoint.configurations.document import choose, only
from dist_infer.checkpoint.configurations.shapes import UNSTATED_LENGTH, Shapes
from dist_infer.model.config import ModelConfig

_PLACEMENTS = {"default": "pre", "reordered_norm": "post", "peri_norm": "both"}
_NORMS = {"default": "layer", "rms": "rms", "fused_rms": "rms", "cute_rms": "rms", "qwen_rms": "rms"}
_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


def recognizes(data: dict[str, Any]) -> bool:
    """Its model has OLMo-core's words."""
    return isinstance(data.get("model"), dict) and "d_model" in data["model"] and "block" in data["model"]


def read(data: dict[str, Any], shapes: Shapes) -> ModelConfig:
    """Blocks must be alike but for their windows and rotary parameters."""
    model = data["model"]
    only(model, "model.", name="default", embedding_norm=None)
    if model.get("embedding_norm"):
        raise ValueError("model.embedding_norm is not supported")
    blocks = _blocks(model)
    layers = [_layer(block, model["d_model"]) for block in blocks]
    if any(layer != layers[0] for layer in layers):
        raise ValueError("blocks of different shapes or kinds are not supported")
    head = model["lm_head"]
    only(head, "model.lm_head.", name="default")
    if head.get("bias") is not False:
        raise ValueError("model.lm_head.bias is not supported")
    norm, eps = _norm(head["layer_norm"])
    if (norm, eps) != (layers[0]["norm"], layers[0]["norm_eps"]):
        raise ValueError("a final layer_norm other than the blocks' is not supported")
    tokenizer = (data.get("dataset") or {}).get("tokenizer") or {}
    eos = tokenizer.get("eos_token_id")
    rotation = _rotation([block.get("sequence_mixer") or block["attention"] for block in blocks])
    return ModelConfig(
        family=_family(layers[0], bool(rotation["sliding_windows"])),
        vocab_size=model["vocab_size"],
        hidden_size=model["d_model"],
        layers=model["n_layers"],
        max_position=_length(data),
        tied_head=bool(model.get("tie_word_embeddings", False)),
        embedding_scale=float(model.get("embed_scale") or 1.0),
        bos_token_id=tokenizer.get("bos_token_id"),
        eos_token_ids=() if eos is None else (eos,),
        **layers[0],
        **rotation,
    )


def _blocks(model: dict[str, Any]) -> list[dict[str, Any]]:
    """The block of each layer: one for all with exceptions, or named ones in a pattern."""
    count, block = model["n_layers"], model["block"]
    if model.get("block_pattern"):
        return [block[name] for name in islice(cycle(model["block_pattern"]), count)]
    overrides = {int(layer): override for layer, override in (model.get("block_overrides") or {}).items()}
    return [overrides.get(layer, block) for layer in range(count)]


def _layer(block: dict[str, Any], hidden: int) -> dict[str, Any]:
    """What ModelConfig says of one layer."""
    attention, ffn = block.get("sequence_mixer") or block["attention"], block.get("feed_forward")
    placement = choose(_PLACEMENTS, "model.block.name", block.get("name", "default"))
    if ffn is None or block.get("feed_forward_moe"):
        raise ValueError("mixtures of experts are not supported")
    only(attention, "attention.", type="attention", clip_qkv=None)
    choose({"default": 0, "fused": 0}, "attention.name", attention.get("name", "default"))
    only(ffn, "feed_forward.", name="default")
    for name in ("gate", "clip_qkv", "softmax_scale"):
        if attention.get(name) is not None:
            raise ValueError(f"attention.{name} is not supported")
    alphas = {float(block.get(f"{branch}_residual_alpha") or 1.0) for branch in ("attention", "feed_forward")}
    if len(alphas) > 1:
        raise ValueError("attention_residual_alpha and feed_forward_residual_alpha that differ are not supported")
    norm, eps = _norm(block["layer_norm"])
    qk_norm, qk_eps = None, None
    if attention.get("qk_norm"):
        qk_kind, qk_eps = _norm(attention["qk_norm"])
        if qk_kind != "rms":
            raise ValueError("attention.qk_norm other than an RMS norm is not supported")
        qk_norm = "head" if attention.get("use_head_qk_norm") else "full"
    bias = attention.get("bias") is not False  # its default is to have one
    return {
        "ffn_size": ffn["hidden_size"],
        "heads": attention["n_heads"],
        "kv_heads": attention.get("n_kv_heads") or attention["n_heads"],
        "head_dim": attention.get("head_dim") or hidden // attention["n_heads"],
        "norm": norm,
        "norm_eps": eps,
        "norm_placement": placement,
        "qkv_bias": bias,
        "output_bias": bias,
        "mlp_bias": ffn.get("bias") is not False,
        "activation": choose(_ACTIVATIONS, "feed_forward.activation", ffn.get("activation", "silu")),
        "qk_norm": qk_norm,
        "qk_norm_eps": qk_eps,
        "residual_scale": alphas.pop(),
    }


def _norm(norm: dict[str, Any]) -> tuple[str, float]:
    """Our word for a norm, and its epsilon."""
    kind = choose(_NORMS, "layer_norm.name", norm.get("name", "default"))
    if norm.get("elementwise_affine") is False:
        raise ValueError("layer_norm.elementwise_affine = False is not supported")
    if (norm.get("bias") is not False) != (kind == "layer"):
        raise ValueError(f"layer_norm.bias = {norm.get('bias')!r} is not supported for a norm of kind {norm.get('name', 'default')!r}")
    return kind, float(norm.get("eps") or 1e-5)


def _rotation(attentions: list[dict[str, Any]]) -> dict[str, Any]:
    """Windows, and how layers with and without one rotate."""
    count = len(attentions)
    windows = tuple(_window(attention.get("sliding_window"), layer, count) for layer, attention in enumerate(attentions))
    kinds: dict[bool, dict[str, Any]] = {}
    unrotated, names = [], set()
    for layer, (attention, window) in enumerate(zip(attentions, windows, strict=True)):
        rope = attention.get("rope")
        if rope is None or (rope.get("no_global_rope") and window is None):
            unrotated.append(layer)
            continue
        names.add(choose({"default": False, "fused": False, "complex": True}, "rope.name", rope.get("name", "default")))
        if kinds.setdefault(window is not None, _rope(rope)) != _rope(rope):
            raise ValueError("rotary parameters that differ between layers of one kind are not supported")
    if len(names) > 1:
        raise ValueError("complex and other rotary embeddings in one model are not supported")
    interleaved = names == {True}
    if interleaved and any("partial_rotary_factor" in rope for rope in kinds.values()):
        raise ValueError("rope.name = 'complex' with a partial_rotary_factor is not supported")
    rope = kinds.get(False) or kinds.get(True) or {"rope_type": "default", "rope_theta": 10000.0}
    local = kinds.get(True)
    return {
        "rope": rope,
        "local_rope": local if local not in (None, rope) else None,
        "unrotated_layers": tuple(unrotated),
        "sliding_windows": windows if any(windows) else (),
        "interleaved_rotary": interleaved,
    }


def _window(sliding: dict[str, Any] | None, layer: int, count: int) -> int | None:
    """The window of one layer: a pattern that is repeated, the first and the last layer left out unless it says otherwise."""
    if sliding is None:
        return None
    first, last = sliding.get("force_full_attention_on_first_layer", True), sliding.get("force_full_attention_on_last_layer", True)
    if (first and layer == 0) or (last and layer == count - 1):
        return None
    pattern = sliding["pattern"]
    window = pattern[(layer - bool(first)) % len(pattern)]
    return None if window == -1 else window


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Hugging Face's rope_parameters."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": float(rope.get("theta", 500_000))}
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        found["partial_rotary_factor"] = rope["partial_rotary_factor"]
    scaling = rope.get("scaling")
    if not scaling:
        return found
    kind = str(scaling.get("_CLASS_", scaling.get("type", ""))).rpartition(".")[2]
    if scaling.get("attention_rescale_factor", 1.0) != 1.0:
        raise ValueError(f"rope.scaling.attention_rescale_factor = {scaling['attention_rescale_factor']!r} is not supported")
    readers = {
        "ABFRoPEScalingConfig": lambda: {"rope_theta": float(scaling.get("new_theta", 8_000_000))},
        "PIRoPEScalingConfig": lambda: {"rope_type": "linear", "factor": float(scaling.get("factor", 2.0))},
        "StepwiseRoPEScalingConfig": lambda: {
            "rope_type": "llama3",
            "factor": float(scaling.get("factor", 32.0)),
            "original_max_position_embeddings": scaling.get("old_context_len", 8192),
            "low_freq_factor": 1.0 / (1 - scaling.get("low_freq_proportion", 0.0)),
            "high_freq_factor": 1.0 / scaling.get("high_freq_proportion", 0.25),
        },
        "YaRNRoPEScalingConfig": lambda: {
            "rope_type": "yarn",
            "factor": float(scaling.get("factor", 8.0)),
            "original_max_position_embeddings": scaling.get("old_context_len", 8192),
            "beta_fast": scaling.get("beta_fast", 32),
            "beta_slow": scaling.get("beta_slow", 1),
        },
    }
    return found | choose(readers, "rope.scaling", kind)()


def _length(data: dict[str, Any]) -> int:
    """Tokens of the longest sequence it was trained on, as far as that is said."""
    places = (("train_module", "max_sequence_length"), ("dataset", "sequence_length"))
    said = [(data.get(section) or {}).get(name) for section, name in places]
    return max((int(length) for length in said if length), default=UNSTATED_LENGTH)


def _family(layer: dict[str, Any], windows: bool) -> str:
    """The family whose weights these are by transformers' names."""
    if layer["norm_placement"] == "post":
        return "olmo3" if windows else "olmo2"
    return "qwen3" if layer["qk_norm"] == "head" else "llama"

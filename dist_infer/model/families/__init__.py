"""The model families as data: what each one's Hugging Face configuration means for the decoder."""

from __future__ import annotations

import importlib
import re
from typing import Any

from dist_infer.model.config import ModelConfig
from dist_infer.model.stored import Stored

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "olmo2",
    "olmo3",
    "phi3",
    "smollm3",
    "granite",
    "gpt2",
    "gpt_neox",
)
# What some configurations can ask for, in any family, and no layer here does.
_UNSUPPORTED = (
    "alibi",
    "add_cross_attention",
    "quantization_config",
    "scale_attn_by_inverse_layer_idx",
    "use_bidirectional_attention",
)


def from_hf(config: Any) -> ModelConfig:
    """The ModelConfig that a transformers configuration describes; of a model with more than text, that of its language model.

    A family that has no file here runs as transformers' own module, if it can.

    Raises:
        ValueError: The family is not supported, or uses a feature the decoder does not have.
    """
    whole, config = config, getattr(config, "text_config", config)
    family = config.model_type
    if not {whole.model_type, family} <= set(FAMILIES):
        from dist_infer.model import fallback

        return fallback.from_hf(whole)
    for name in _UNSUPPORTED:
        if getattr(config, name, None):
            raise ValueError(f"{name} = {getattr(config, name)!r} is not supported for {family}")
    eos = getattr(whole, "eos_token_id", None)
    eos = config.eos_token_id if eos is None else eos
    values = {
        "family": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "ffn_size": getattr(config, "intermediate_size", None),
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": getattr(config, "num_key_value_heads", None),
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "norm_eps": getattr(config, "rms_norm_eps", None),
        "max_position": config.max_position_embeddings,
        "rope": dict(getattr(config, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10000.0}),
        "activation": getattr(config, "hidden_act", None),
        "tied_head": bool(config.tie_word_embeddings),
        "dtype": str(whole.dtype).removeprefix("torch.") if whole.dtype is not None else None,
        "bos_token_id": config.bos_token_id,
        "eos_token_ids": tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,),
        **importlib.import_module(f"{__name__}.{family}").traits(config),
    }
    if values["heads"] % values["kv_heads"]:
        raise ValueError(f"{values['heads']} query heads cannot share {values['kv_heads']} KV heads evenly")
    return ModelConfig(**values)


def stored(name: str, config: ModelConfig) -> Stored:
    """Where transformers keeps the canonical tensor `name` on disk: under that name, unless the family says otherwise."""
    if config.fallback is not None:
        from dist_infer.model import fallback

        return fallback.stored(name, config)
    family = importlib.import_module(f"{__name__}.{config.family}")
    return family.stored(name, config) if hasattr(family, "stored") else Stored(name)


def unconverted(name: str, config: ModelConfig) -> Stored:
    """Where the canonical tensor `name` is in a transformers module that was saved as it is: experts lie in packs, gates above ups."""
    if config.fallback is not None:
        from dist_infer.model import fallback

        return fallback.held(name, config)
    expert = re.fullmatch(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
    if expert is None or config.experts is None:
        return Stored(name)
    count, ffn, hidden = config.experts.count, config.experts.ffn_size, config.hidden_size
    pack, member, kind = expert[1], int(expert[2]), expert[3]
    if kind == "down":
        return Stored(f"{pack}.down_proj", (count, hidden, ffn), member=member)
    return Stored(f"{pack}.gate_up_proj", (count, 2 * ffn, hidden), offset=ffn if kind == "up" else 0, member=member)


def landmarks() -> list[tuple[str, str]]:
    """On-disk names of the token embedding and of one more weight that every model has, for each way families are named."""
    modules = [importlib.import_module(f"{__name__}.{family}") for family in FAMILIES]
    plain = ("model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight")
    return list(dict.fromkeys(getattr(module, "LANDMARKS", plain) for module in modules))


def split(name: str) -> tuple[str | None, str, str]:
    """The layer's number, if it is of a layer, the module's path, and "weight" or "bias", of a canonical name."""
    path, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path)
    return (None, path, kind) if layer is None else (layer[1], layer[2], kind)


def rope_by_layer_type(config: Any) -> dict[str, Any]:
    """The traits that say how layers without a window rotate, and how those with one do where it is otherwise."""
    full, local = (dict(config.rope_parameters[kind]) for kind in ("full_attention", "sliding_attention"))
    return {"rope": full, "local_rope": local if local != full else None}


def sliding_windows(config: Any) -> tuple[int | None, ...]:
    """The window of each layer, from transformers' `layer_types` and `sliding_window`; empty when no layer has one.

    Raises:
        ValueError: A layer's attention is of another kind.
    """
    types = getattr(config, "layer_types", None) or []
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"layer type {kind!r} is not supported; supported are full_attention and sliding_attention")
    if config.sliding_window is None or "sliding_attention" not in types:
        return ()
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in types)

"""The model families as data: what each one's Hugging Face configuration means for the decoder."""

from __future__ import annotations

import importlib
from typing import Any

from dist_infer.model.config import ModelConfig
from dist_infer.model.stored import Stored

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def from_hf(config: Any) -> ModelConfig:
    """The ModelConfig that a transformers configuration describes.

    Raises:
        ValueError: The family is not supported, or uses a feature the decoder does not have.
    """
    family = config.model_type
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act {config.hidden_act!r} is not supported for {family}; supported is silu")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(f"{config.num_attention_heads} query heads cannot share {config.num_key_value_heads} KV heads evenly")
    traits = importlib.import_module(f"{__name__}.{family}").traits(config)
    eos = config.eos_token_id
    return ModelConfig(
        family=family,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        ffn_size=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        norm_eps=config.rms_norm_eps,
        max_position=config.max_position_embeddings,
        rope=dict(config.rope_parameters),
        tied_head=bool(config.tie_word_embeddings),
        dtype=str(config.dtype).removeprefix("torch.") if config.dtype is not None else None,
        bos_token_id=config.bos_token_id,
        eos_token_ids=tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,),
        **traits,
    )


def stored(name: str, config: ModelConfig) -> Stored:
    """Where transformers keeps the canonical tensor `name` on disk: under that name, unless the family says otherwise."""
    family = importlib.import_module(f"{__name__}.{config.family}")
    return family.stored(name, config) if hasattr(family, "stored") else Stored(name)


def landmarks() -> list[tuple[str, str]]:
    """On-disk names of the token embedding and of one more weight that every model has, for each way families are named."""
    modules = [importlib.import_module(f"{__name__}.{family}") for family in FAMILIES]
    plain = ("model.embed_tokens.weight", "model.layers.0.self_attn.o_proj.weight")
    return list(dict.fromkeys(getattr(module, "LANDMARKS", plain) for module in modules))


def sliding_windows(config: Any) -> tuple[int | None, ...]:
    """The window of each layer, from transformers' `layer_types` and `sliding_window`; empty when no layer has one."""
    types = getattr(config, "layer_types", None) or []
    if config.sliding_window is None or "sliding_attention" not in types:
        return ()
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in types)

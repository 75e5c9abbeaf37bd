"""The transformers configuration of a model, whoever trained it."""

from __future__ import annotations

import importlib
import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_infer.checkpoint.configurations import beside
from dist_infer.model.config import ModelConfig
from dist_infer.model.families import FAMILIES, from_hf


def transformers_config(config: ModelConfig, path: Path, explicit: str | None) -> tuple[ModelConfig, dict[str, Any]]:
    """What transformers' `config.json` must say for `config`: the one that is there already, else one made anew.

    A model from a trainer of its own is given the first family of transformers that is the same model.

    Args:
        config: The model.
        path: Its checkpoint, which a configuration may lie beside.
        explicit: Or the file that the user named.

    Returns:
        The model as that family's, and the content of the file.

    Raises:
        ValueError: transformers has no such model.
    """
    found = _existing(config, path, explicit)
    if found is not None:
        return config, found
    for family in dict.fromkeys((config.family, *FAMILIES)):
        data = _made(config, family)
        if data is not None and _same(config, family, data):
            return replace(config, family=family), data
    raise ValueError(f"{path}: transformers has no model that is this {config.family}; export it with format=dcp")


def _existing(config: ModelConfig, path: Path, explicit: str | None) -> dict[str, Any] | None:
    """A transformers configuration that the checkpoint came with."""
    if config.fallback is not None:
        return dict(config.fallback)
    files = [Path(explicit).expanduser()] if explicit else [place / "config.json" for place in beside(path)]
    for file in (file / "config.json" if file.is_dir() else file for file in files):
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(data, dict) and "model_type" in data:
            data = {**data.get("text_config", data), "eos_token_id": data.get("eos_token_id")}
            data = {key: value for key, value in data.items() if key not in ("auto_map", "quantization_config")}
            return data if _same(config, config.family, data) else None
    return None


def _made(config: ModelConfig, family: str) -> dict[str, Any] | None:
    """The configuration of `family` with the sizes and traits of `config`; None where the family is not built so."""
    from transformers import CONFIG_MAPPING

    windows = {window for window in config.sliding_windows if window is not None}
    kinds = ["full_attention" if config.window(layer) is None else "sliding_attention" for layer in range(config.layers)]
    eos = config.eos_token_ids
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_position,
        "rope_parameters": {key: value for key, value in config.rope.items() if value is not None},
        "hidden_act": config.activation,
        "tie_word_embeddings": config.tied_head,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "use_sliding_window": bool(windows),
        "sliding_window": max(windows, default=None),
        "layer_types": kinds,
        "max_window_layers": 0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "pad_token_id": None,
    }
    if config.experts is not None:
        experts = config.experts
        values |= {
            "num_experts": experts.count,
            "num_local_experts": experts.count,
            "num_experts_per_tok": experts.chosen,
            "moe_intermediate_size": experts.ffn_size,
            "shared_expert_intermediate_size": experts.shared_ffn_size,
            "norm_topk_prob": experts.normalized,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [layer for layer in range(config.layers) if layer not in experts.layers],
        }
    if family not in CONFIG_MAPPING:
        return None
    kind = CONFIG_MAPPING[family]
    known = inspect.signature(kind).parameters
    try:
        made = kind(**{key: value for key, value in values.items() if key in known})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    classes = importlib.import_module("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return {**made.to_dict(), "architectures": [classes[family]]}


def _same(config: ModelConfig, family: str, data: dict[str, Any]) -> bool:
    """Whether transformers' `data` describes `config`."""
    from transformers import CONFIG_MAPPING

    if data["model_type"] not in CONFIG_MAPPING:
        return False
    try:
        read = from_hf(CONFIG_MAPPING[data["model_type"]].from_dict(dict(data)))
    except (ValueError, TypeError, KeyError, AttributeError):
        return False
    return _plain(read) == replace(_plain(config), family=family)


def _plain(config: ModelConfig) -> ModelConfig:
    """`config` with what can be said in two ways said in one."""
    rope = {key: value for key, value in config.rope.items() if value is not None}
    windows = config.sliding_windows if any(config.sliding_windows) else ()
    return replace(config, dtype=None, rope=rope, sliding_windows=windows, qk_norm_eps=config.head_norm_eps if config.qk_norm else None)

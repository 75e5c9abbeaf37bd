"""Finds and reads the configuration of the model in a checkpoint, in whatever form its trainer left it."""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from dist_infer.model.config import ModelConfig
from dist_infer.model.families import FAMILIES, from_hf

_PARENTS = 3  # how far above the checkpoint a run's configuration may lie
_KINDS = "Hugging Face config.json, KempnerForge TOML, torchtitan JSON, or a file of our own model fields"


def beside(path: Path) -> Iterator[Path]:
    """The directories where things that belong to the checkpoint at `path` may lie, the nearest first."""
    place = (path if path.is_dir() else path.parent).resolve()
    yield from (place, *list(place.parents)[:_PARENTS])


def find_configuration(path: Path) -> Path:
    """The file that configures the model of the checkpoint at `path`.

    Raises:
        FileNotFoundError: None of the directories where one may lie has one.
    """
    for place in beside(path):
        for name in ("config.json", "config.toml", "config.yaml", "config.yml"):
            if (place / name).is_file() and _kind(place / name) is not None:
                return place / name
        for file in sorted(place.glob("*.toml")):
            if _kind(file) is not None:
                return file
    places = ", ".join(map(str, beside(path)))
    raise FileNotFoundError(
        f"no model configuration for {path}: looked for config.json, *.toml and config.yaml in {places}; give model.config=FILE"
    )


def read_configuration(path: Path) -> ModelConfig:
    """The ModelConfig that the file (or directory of a config.json) at `path` describes.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is none of the known kinds, or asks for what the decoder does not have.
    """
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"model.config={path}: no such file")
    kind = _kind(path)
    if kind is None:
        raise ValueError(f"model.config={path}: not a model configuration; give a {_KINDS}")
    readers = {"huggingface": _huggingface, "torchtitan": _torchtitan, "kempnerforge": _kempnerforge, "own": _own}
    try:
        return readers[kind](_parse(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a complete {kind} configuration: {type(error).__name__} {error}") from error


def _parse(path: Path) -> Any:
    """The content of `path`, by its suffix.

    Raises:
        ValueError: It cannot be parsed.
    """
    import yaml

    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            return json.loads(text)
        return tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not readable: {' '.join(str(error).split())}") from error


def _kind(path: Path) -> str | None:
    """Who wrote the configuration at `path`; None when it configures no model we know."""
    data = _parse(path)
    if not isinstance(data, dict):
        return None
    if path.suffix == ".toml":
        return "kempnerforge" if isinstance(data.get("model"), dict) else None
    if "model_spec" in data:
        return "torchtitan"
    if "model_type" in data:
        return "huggingface"
    return "own" if "family" in data else None


def _huggingface(data: dict[str, Any]) -> ModelConfig:
    """Read by transformers' own class for the model type; code that a configuration brings along is never looked at."""
    from transformers import CONFIG_MAPPING

    family = data["model_type"]
    if family not in FAMILIES:
        remote = ", and code from a checkpoint is never run" if "auto_map" in data else ""
        raise ValueError(f"model_type {family!r} is not supported{remote}; supported are {', '.join(FAMILIES)}")
    return from_hf(CONFIG_MAPPING[family].from_dict({key: value for key, value in data.items() if key != "auto_map"}))


def _kempnerforge(data: dict[str, Any]) -> ModelConfig:
    """KempnerForge's defaults where the run's file is silent."""
    model = data["model"]
    for name, valid in (("model_type", "transformer"), ("norm_type", "rmsnorm"), ("activation", "silu"), ("num_experts", 0)):
        if model.get(name, valid) != valid:
            raise ValueError(f"model.{name} = {model[name]!r} is not supported; supported is {valid!r}")
    hidden, heads = model.get("dim", 4096), model.get("n_heads", 32)
    ffn = model.get("ffn_hidden_dim")
    if ffn is None:
        ffn = 256 * math.ceil(int(4 * hidden * (2 / 3) * model.get("ffn_dim_multiplier", 1.0)) / 256)
    return ModelConfig(
        family="llama",
        vocab_size=model.get("vocab_size", 32000),
        hidden_size=hidden,
        ffn_size=ffn,
        layers=model.get("n_layers", 32),
        heads=heads,
        kv_heads=model.get("n_kv_heads") or heads,
        head_dim=hidden // heads,
        norm_eps=model.get("norm_eps", 1e-5),
        max_position=model.get("max_seq_len", 2048),
        rope={"rope_type": "default", "rope_theta": float(model.get("rope_theta", 10000.0))},
        tied_head=model.get("tie_embeddings", False),
        qk_norm="head" if model.get("qk_norm", False) else None,
        qk_norm_eps=1e-5,  # whatever norm_eps says
    )


def _torchtitan(data: dict[str, Any]) -> ModelConfig:
    """The model as torchtitan built it, layer by layer; layers must be alike."""
    spec = data["model_spec"]
    family = {"llama3": "llama", "qwen3": "qwen3"}.get(spec["name"])
    if family is None:
        raise ValueError(f"model_spec.name = {spec['name']!r} is not supported; supported are llama3 and qwen3")
    model = spec["model"]
    layers = [_torchtitan_layer(layer, model["dim"]) for layer in model["layers"]]
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
        rope=_torchtitan_rope(rope),
        tied_head=model["enable_weight_tying"],
        **layers[0],
    )


def _torchtitan_layer(layer: dict[str, Any], hidden: int) -> dict[str, Any]:
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


def _torchtitan_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Hugging Face's rope_parameters for torchtitan's."""
    theta = {"rope_theta": float(rope["theta"])}
    if rope["scaling"] == "none":
        return {"rope_type": "default", **theta}
    if rope["scaling"] != "llama":
        raise ValueError(f"rope scaling {rope['scaling']!r} is not supported; supported are none and llama")
    return {
        "rope_type": "llama3",
        "factor": rope["scaling_factor"],
        **{name: rope[name] for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")},
        **theta,
    }


def _own(data: dict[str, Any]) -> ModelConfig:
    """Our own fields, by their names in ModelConfig."""
    known = {field.name: field for field in fields(ModelConfig)}
    for name in data:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"unknown field {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"valid are {', '.join(known)}"))
    absent = [name for name, field in known.items() if field.default is MISSING and field.default_factory is MISSING and name not in data]
    if absent:
        raise ValueError(f"field {absent[0]!r} is missing" + (f", and {', '.join(absent[1:])}" if absent[1:] else ""))
    values = {name: _typed(name, str(known[name].type), value) for name, value in data.items()}
    if values["family"] not in FAMILIES:
        raise ValueError(f"family {values['family']!r} is not supported; supported are {', '.join(FAMILIES)}")
    return ModelConfig(**values)


def _typed(name: str, annotation: str, value: Any) -> Any:
    """`value` as the field `name` wants it (YAML reads 1e-5 as text and knows no tuples)."""
    if value is None and "None" in annotation:
        return None
    if annotation.startswith("tuple") and isinstance(value, list):
        return tuple(value)
    wanted = {"int": int, "str": str, "bool": bool, "dict": dict, "float": float}.get(annotation.split(" ")[0].split("[")[0])
    if wanted is float and isinstance(value, int | str) and not isinstance(value, bool):
        value = float(value)
    if wanted is None or not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise ValueError(f"{name} = {value!r} is not a {annotation}")
    return value

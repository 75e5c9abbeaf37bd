"""The torchtune_config.yaml of a run: it names the function that builds the model."""

from __future__ import annotations

from typing import Any, NamedTuple

from dist_infer.checkpoint.configurations.document import choose
from dist_infer.checkpoint.configurations.shapes import Shapes
from dist_infer.model.config import ModelConfig

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class _Kind(NamedTuple):
    """What all models of one torchtune module share."""

    family: str
    theta: float
    factor: float | None = None  # of Llama 3.1's rotary scaling
    tied: bool = False


_MODULES = {
    "llama2": _Kind("llama", 10_000.0),
    "llama3": _Kind("llama", 500_000.0),
    "llama3_1": _Kind("llama", 500_000.0, 8.0),
    "llama3_2": _Kind("llama", 500_000.0, 32.0, tied=True),
    "llama3_3": _Kind("llama", 500_000.0, 8.0),
    "mistral": _Kind("llama", 10_000.0),
    "qwen2": _Kind("qwen2", 1_000_000.0),
    "qwen2_5": _Kind("qwen2", 1_000_000.0),
    "qwen3": _Kind("qwen3", 1_000_000.0),
}
# What the shapes do not tell of the models that have a builder of their own: heads, length, epsilon.
_BUILDERS = {
    "llama2_7b": (32, 4096, 1e-5),
    "llama2_13b": (40, 4096, 1e-5),
    "llama2_70b": (64, 4096, 1e-5),
    "llama3_8b": (32, 8192, 1e-5),
    "llama3_70b": (64, 8192, 1e-5),
    "llama3_1_8b": (32, 131072, 1e-5),
    "llama3_1_70b": (64, 131072, 1e-5),
    "llama3_1_405b": (128, 131072, 1e-5),
    "llama3_2_1b": (32, 131072, 1e-5),
    "llama3_2_3b": (24, 131072, 1e-5),
    "llama3_3_70b": (64, 131072, 1e-5),
    "mistral_7b": (32, 32768, 1e-5),
    "qwen2_0_5b": (14, 32768, 1e-6),
    "qwen2_1_5b": (12, 32768, 1e-6),
    "qwen2_7b": (28, 32768, 1e-6),
    "qwen2_5_0_5b": (14, 32768, 1e-6),
    "qwen2_5_1_5b_base": (12, 131072, 1e-6),
    "qwen2_5_1_5b_instruct": (12, 32768, 1e-6),
    "qwen2_5_3b": (16, 32768, 1e-6),
    "qwen2_5_7b_base": (28, 131072, 1e-6),
    "qwen2_5_7b_instruct": (28, 32768, 1e-6),
    "qwen2_5_14b_base": (40, 131072, 1e-5),
    "qwen2_5_14b_instruct": (40, 32768, 1e-6),
    "qwen2_5_32b_base": (40, 131072, 1e-5),
    "qwen2_5_32b_instruct": (40, 32768, 1e-6),
    "qwen2_5_72b_base": (64, 131072, 1e-5),
    "qwen2_5_72b_instruct": (64, 32768, 1e-6),
    "qwen3_0_6b_base": (16, 32768, 1e-6),
    "qwen3_0_6b_instruct": (16, 40960, 1e-6),
    "qwen3_1_7b_base": (16, 32768, 1e-6),
    "qwen3_1_7b_instruct": (16, 40960, 1e-6),
    "qwen3_4b_base": (32, 32768, 1e-6),
    "qwen3_4b_instruct": (32, 40960, 1e-6),
    "qwen3_8b_base": (32, 32768, 1e-6),
    "qwen3_8b_instruct": (32, 40960, 1e-6),
    "qwen3_14b_base": (40, 32768, 1e-6),
    "qwen3_14b_instruct": (40, 40960, 1e-6),
    "qwen3_32b": (64, 40960, 1e-6),
}


def recognizes(data: dict[str, Any]) -> bool:
    """Its model is a component of torchtune's."""
    model = data.get("model")
    return isinstance(model, dict) and str(model.get("_component_", "")).startswith("torchtune.")


def read(data: dict[str, Any], shapes: Shapes) -> ModelConfig:
    """Sizes as the weights have them for a named model; as the file says for a general builder such as `llama3_1`."""
    model = dict(data["model"])
    component = model.pop("_component_")
    parts = component.split(".")
    module, function = parts[2], parts[-1].removeprefix("lora_")
    kind: _Kind = choose(_MODULES, "model._component_", module)
    if function == module:
        fields = _general(model, kind, shapes)
    elif function in _BUILDERS:
        heads, length, eps = _BUILDERS[function]
        tied = kind.tied if kind.family == "llama" else shapes.fields.get("tied_head", False)
        tied = bool(model.get("tie_word_embeddings", tied))
        fields = {"heads": heads, "max_position": length, "norm_eps": eps, "tied_head": tied}
    else:
        asked = shapes.ask("give model.config=FILE, ")
        raise ValueError(f"model._component_ = {component!r} is not known here, and its sizes are not in the file; {asked}")
    factor = model.get("scale_factor", kind.factor)
    theta = {"rope_theta": float(model.get("rope_base", kind.theta))}
    rope = {"rope_type": "default", **theta} if factor is None else {"rope_type": "llama3", "factor": float(factor), **_LLAMA3, **theta}
    return shapes.complete({"family": kind.family, "rope": rope, **fields})


def _general(model: dict[str, Any], kind: _Kind, shapes: Shapes) -> dict[str, Any]:
    """The arguments of a general builder, in our words."""
    hidden, heads = model["embed_dim"], model["num_heads"]
    ffn = model.get("intermediate_dim") or 256 * -(-4 * int(2 * hidden / 3) // 256)
    biases = {bool(model.get(f"{name}_proj_bias", kind.family.startswith("qwen"))) for name in "qkv"}
    norms = {bool(model.get(f"{name}_norm", False)) for name in "qk"}
    if len(biases) + len(norms) > 2:
        raise ValueError("biases or norms of some of q, k and v only are not supported")
    return {
        "vocab_size": model["vocab_size"],
        "hidden_size": hidden,
        "ffn_size": ffn,
        "layers": model["num_layers"],
        "heads": heads,
        "kv_heads": model.get("num_kv_heads") or heads,
        "head_dim": model.get("head_dim") or hidden // heads,
        "norm_eps": float(model.get("norm_eps", 1e-5)),
        "max_position": model["max_seq_len"],
        "tied_head": bool(model.get("tie_word_embeddings", kind.tied)),
        "qkv_bias": biases.pop(),
        "qk_norm": "head" if norms.pop() else None,
    }

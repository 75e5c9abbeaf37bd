"""litgpt's model_config.yaml."""

from __future__ import annotations

from typing import Any

from dist_infer.checkpoint.configurations.document import choose, only
from dist_infer.checkpoint.configurations.shapes import Shapes
from dist_infer.model.config import ExpertsConfig, ModelConfig

_UNSUPPORTED = {
    "shared_attention_norm": False, "lm_head_bias": False, "latent_attention": None, "n_expert_groups": None, "n_shared_expert": None,
}  # fmt: skip
_GELU = {"none": "gelu", "tanh": "gelu_pytorch_tanh"}


def recognizes(data: dict[str, Any]) -> bool:
    """It has litgpt's words for sizes."""
    return "n_embd" in data and "n_layer" in data and "norm_class_name" in data


def read(data: dict[str, Any], shapes: Shapes) -> ModelConfig:
    """litgpt's own defaults where the file is silent (it never is when litgpt wrote it)."""
    for name, valid in _UNSUPPORTED.items():
        if data.get(name) not in (None, 0, valid):
            raise ValueError(f"{name} = {data[name]!r} is not supported")
    hidden, heads, layers = data["n_embd"], data["n_head"], data["n_layer"]
    head_dim, gemma = data.get("head_size") or hidden // heads, "Gemma" in data.get("name", "")
    mlp, bias = data.get("mlp_class_name", "GptNeoxMLP"), data.get("bias", True)
    gelu = choose(_GELU, "gelu_approximate", data.get("gelu_approximate", "none"))
    activation = choose({"LLaMAMLP": "silu", "LLaMAMoE": "silu", "GemmaMLP": gelu, "GptNeoxMLP": gelu}, "mlp_class_name", mlp)
    norm = choose({"RMSNorm": "rms_unit" if gemma else "rms", "LayerNorm": "layer"}, "norm_class_name", data["norm_class_name"])
    qk_norm = choose({"default": "head", "olmo2": "full"}, "norm_qk_type", data.get("norm_qk_type", "default"))
    scalar = data.get("attention_scores_scalar")
    rope, local_rope, windows = _rotation(data, layers)
    return ModelConfig(
        family="qwen3" if data.get("norm_qk") and qk_norm == "head" else "llama",
        vocab_size=data.get("padded_vocab_size") or -(-data["vocab_size"] // data["padding_multiple"]) * data["padding_multiple"],
        hidden_size=hidden,
        ffn_size=data.get("intermediate_size") or 4 * hidden,
        layers=layers,
        heads=heads,
        kv_heads=data.get("n_query_groups") or heads,
        head_dim=head_dim,
        norm_eps=float(data.get("norm_eps", 1e-5)),
        max_position=data["block_size"],
        rope=rope,
        local_rope=local_rope,
        sliding_windows=windows,
        qkv_bias=bias or data.get("attn_bias", False),
        output_bias=bias,
        mlp_bias=bias,
        qk_norm=qk_norm if data.get("norm_qk") else None,
        norm=norm,
        norm_placement=_placement(data),
        parallel_residual=data.get("parallel_residual", True),
        activation=activation,
        gated_mlp=mlp != "GptNeoxMLP",
        attention_scale=scalar**-0.5 if scalar is not None else None,
        attention_softcap=data.get("attention_logit_softcapping"),
        logit_softcap=data.get("final_logit_softcapping"),
        embedding_scale=hidden**0.5 if data.get("scale_embeddings") else 1.0,
        interleaved_rotary=bool(data.get("rope_interleave", False)),
        experts=_experts(data, layers) if mlp == "LLaMAMoE" else None,
    )


def _placement(data: dict[str, Any]) -> str:
    """Where norms are, by which of the four there are."""
    before = {bool(data.get(name, True)) for name in ("norm_1", "norm_2")}
    after = {bool(data.get(name, False)) for name in ("post_attention_norm", "post_mlp_norm")}
    placement = {(True, False): "pre", (False, True): "post", (True, True): "both"}
    if len(before) > 1 or len(after) > 1 or (min(before), min(after)) not in placement:
        raise ValueError("norms of one branch only (norm_1, norm_2, post_attention_norm, post_mlp_norm) are not supported")
    return placement[before.pop(), after.pop()]


def _rotation(data: dict[str, Any], layers: int) -> tuple[dict[str, Any], dict[str, Any] | None, tuple[int | None, ...]]:
    """Rotary parameters, those of layers with a window, and the windows."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(data.get("rope_base", 10000))}
    share = data.get("rotary_percentage", 0.25)
    if share != 1.0:
        rope["partial_rotary_factor"] = share
    local = {**rope, "rope_theta": float(data["rope_local_base_freq"])} if data.get("rope_local_base_freq") else None
    adjustments, condense = data.get("rope_adjustments"), data.get("rope_condense_ratio", 1)
    if condense != 1:
        only(data, "", rope_adjustments=None, rope_local_base_freq=None)
        rope |= {"rope_type": "linear", "factor": float(condense)}
    elif adjustments:
        rope |= _adjusted(adjustments)
    window = data.get("sliding_window_size")
    chosen = (data.get("sliding_window_indices") or [1] * layers)[:layers]
    if local is not None and (window is None or (data.get("rope_indices") or [1] * layers)[:layers] != chosen):
        raise ValueError("rope_indices that differ from sliding_window_indices are not supported")
    return rope, local, tuple(window if one else None for one in chosen) if window is not None else ()


def _adjusted(adjustments: dict[str, Any]) -> dict[str, Any]:
    if "beta_fast" in adjustments or "beta_slow" in adjustments:
        raise ValueError("rope_adjustments by YaRN are not supported; supported are Llama 3's and a factor alone")
    if "low_freq_factor" not in adjustments:
        return {"rope_type": "linear", "factor": float(adjustments["factor"])}
    return {
        "rope_type": "llama3",
        **{name: float(adjustments[name]) for name in ("factor", "low_freq_factor", "high_freq_factor")},
        "original_max_position_embeddings": adjustments["original_max_seq_len"],
    }


def _experts(data: dict[str, Any], layers: int) -> ExpertsConfig:
    """The softmax is over the chosen experts alone, which is the same as over all and then normalized."""
    return ExpertsConfig(
        count=data["n_expert"],
        chosen=data["n_expert_per_token"],
        ffn_size=data.get("moe_intermediate_size") or data["intermediate_size"],
        layers=tuple(range(data.get("first_k_dense_replace") or 0, layers)),
        scale=data.get("routed_scaling_factor", 1.0),
    )

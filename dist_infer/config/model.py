"""Which checkpoint, and how to read it."""

from __future__ import annotations

from dataclasses import dataclass

from dist_infer.config.field import option


@dataclass
class ModelOptions:
    """The checkpoint and what belongs to it."""

    path: str | None = option(
        None, "checkpoint: a directory, its parent, a .safetensors, .bin or .pth file, or a Hugging Face id in the local cache"
    )
    step: int | None = option(None, "which step of the run in model.path; default: the one its `latest` names, or the newest", low=0)
    config: str | None = option(
        None, "model configuration: config.json, a trainer's TOML or JSON, or YAML; default: found beside the checkpoint"
    )
    tokenizer: str | None = option(
        None, "tokenizer directory or Hugging Face id; default: found beside the checkpoint; 'none' for token ids only"
    )
    dtype: str = option(
        "auto", "compute type of weights and KV cache; auto is the checkpoint's own", choices=("auto", "float32", "bfloat16", "float16")
    )
    dialect: str = option(
        "auto",
        "how the trainer named its weights: huggingface, kempnerforge, torchtitan, olmo_core, torchtune, litgpt, fast_llm, "
        "or a YAML file that describes it; auto finds it by the names",
    )

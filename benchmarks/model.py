"""The models the benchmarks run: real shapes, random weights in bfloat16, as a trainer's checkpoint and as safetensors."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 32_000
MAX_POSITIONS = 8192
DEVIATION = 0.02  # of the weights: logits are flat, and greedy tokens easily moved

# hidden, ffn, layers, heads, KV heads, head_dim, vocabulary, whether the head is tied
_SHAPES: dict[str, tuple[int, int, int, int, int, int, int, bool]] = {
    "tiny": (256, 512, 2, 4, 2, 64, VOCABULARY, True),
    "135M": (576, 1536, 30, 9, 3, 64, 49_152, True),  # SmolLM
    "303M": (1024, 2816, 24, 16, 4, 64, VOCABULARY, True),
    "1.3B": (2048, 5632, 24, 16, 8, 128, VOCABULARY, False),
    "8B": (4096, 14_336, 32, 32, 8, 128, 128_256, False),  # Llama 3.1
}
MODELS = tuple(_SHAPES)


def model_config(name: str, **changes: Any) -> LlamaConfig:
    """The configuration of one of `MODELS`, with `changes`."""
    hidden, ffn, layers, heads, kv_heads, head_dim, vocabulary, tied = _SHAPES[name]
    given: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
    }
    return LlamaConfig(**given | changes)


def write_model(config: LlamaConfig, directory: Path, seed: int = 0) -> int:
    """Save random weights as `directory`/dcp and `directory`/safetensors, each with its configuration; returns their bytes."""
    with torch.device("meta"):
        names = LlamaForCausalLM(config).state_dict()
    maker = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(maker).manual_seed(seed)
    weights = {}
    for name, empty in names.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = torch.empty(empty.shape, dtype=torch.bfloat16, device=maker)
        weights[name] = (weight.fill_(1) if weight.dim() == 1 else weight.normal_(0, DEVIATION, generator=generator)).cpu()
    for kind in ("dcp", "safetensors"):
        (directory / kind).mkdir(parents=True)
        (directory / kind / "config.json").write_text(config.to_json_string(use_diff=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process only
        dcp.save({"model": weights}, checkpoint_id=directory / "dcp", no_dist=True)
    save_file(weights, directory / "safetensors" / "model.safetensors", {"format": "pt"})
    return sum(weight.nbytes for weight in weights.values())

"""The model the benchmarks run: 303 million random weights in bfloat16, as a trainer's checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 32_000


def make_model(seed: int = 0) -> LlamaForCausalLM:
    """A Llama of 24 layers with a tied head; random, so its logits are flat and its greedy tokens easily moved."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="sdpa",
        dtype="bfloat16",
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def write_checkpoint(model: LlamaForCausalLM, directory: Path) -> None:
    """Save `model` as a DCP directory with its configuration beside the shards."""
    weights = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    dcp.save({"model": weights}, checkpoint_id=directory, no_dist=True)
    (directory / "config.json").write_text(model.config.to_json_string(use_diff=False))


def large_config(layers: int) -> LlamaConfig:
    """A Llama of 96 MB a layer in bfloat16, whose sizes 8 ranks divide."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )


def write_large_checkpoint(config: LlamaConfig, directory: Path) -> int:
    """Save small random weights as `directory`/dcp and `directory`/safetensors; returns their bytes."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    weights = {name: torch.empty(shape, dtype=torch.bfloat16).random_(-8, 9).mul_(0.004) for name, shape in shapes.items()}
    for kind in ("dcp", "safetensors"):
        (directory / kind).mkdir()
        (directory / kind / "config.json").write_text(config.to_json_string(use_diff=False))
    dcp.save({"model": weights}, checkpoint_id=directory / "dcp", no_dist=True)
    save_file(weights, directory / "safetensors" / "model.safetensors", {"format": "pt"})
    return sum(tensor.nbytes for tensor in weights.values())

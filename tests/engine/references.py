"""What the engine must say: the fixtures' reference logits and tokens, and transformers run on small random models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

FIXTURES = Path(__file__).parents[1] / "data" / "fixtures"
CHECKPOINTS = {
    "hf_llama": ".",
    "hf_qwen2": ".",
    "hf_qwen3": ".",
    "hf_mistral": ".",
    "hf_gemma3_text": ".",
    "hf_mixtral": ".",
    "kempnerforge": "checkpoints/step_3",
    "kempnerforge_tied": "checkpoints/step_3",
    "torchtitan_llama3": "outputs/checkpoint/step-3",
    "torchtitan_llama3_full": "outputs/checkpoint/step-3",
    "torchtitan_qwen3": "outputs/checkpoint/step-3",
    "accelerate_fsdp2_llama": "checkpoint-3",
    "kempnerforge_moe": "checkpoints/step_3",
    "kempnerforge_pp2": "checkpoints/step_3",
    "olmo_core_llama": "step3",
    "litgpt_llama": ".",
    "fast_llm_llama": ".",
}


@dataclass(frozen=True)
class Reference:
    """A fixture: where its checkpoint is, and of each input the logits [tokens, vocabulary] and the greedy continuation."""

    path: str
    inputs: list[list[int]]
    logits: list[Tensor]
    greedy: list[list[int]]


@cache
def reference(name: str) -> Reference:
    """The fixture called `name`."""
    tensors = load_file(FIXTURES / name / "reference.safetensors")
    return Reference(
        str(FIXTURES / name / CHECKPOINTS[name]),
        [tensors[f"inputs_{i}"].tolist() for i in range(3)],
        [tensors[f"logits_{i}"].float() for i in range(3)],
        [tensors[f"greedy_{i}"].tolist() for i in range(3)],
    )


def make_model(directory: Path, seed: int = 0, std: float = 0.15, **config: Any) -> PreTrainedModel:
    """A small random model, saved at `directory` as transformers saves it; its norms and biases are random too."""
    sizes: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 131,
        "hidden_size": 48,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**sizes, **config}), attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            is_norm = ("norm" in name or ".ln_" in name) and not name.endswith("bias")
            parameter.copy_(noise + 1 if is_norm else noise)
    model.save_pretrained(directory)
    return model.eval()


@torch.no_grad()
def logits(path: Path, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits [tokens, vocabulary] of each prompt alone, by transformers on a model fresh from `path`."""
    found = []
    for prompt in prompts:
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        found.append(model(torch.tensor([list(prompt)])).logits[0])
    return found


@dataclass(frozen=True)
class Continuation:
    """A greedy continuation by transformers: its tokens, and the logits [tokens, vocabulary] each was chosen from."""

    tokens: list[int]
    logits: Tensor


@torch.no_grad()
def greedy(path: Path, prompt: Sequence[int], count: int, cache: bool = True) -> Continuation:
    """Continue `prompt` alone, in a model fresh from `path`, as transformers' `generate` does.

    Args:
        path: What `make_model` saved.
        prompt: Token ids.
        count: Tokens to produce.
        cache: Keep keys and values; else each step computes the whole sequence anew.
    """
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **eager).eval()
    out = model.generate(
        torch.tensor([list(prompt)]),
        max_new_tokens=count,
        do_sample=False,
        use_cache=cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return Continuation(out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits))

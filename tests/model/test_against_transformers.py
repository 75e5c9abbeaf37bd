"""Small random models with every trait a family may have, against transformers run beside them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_infer.engine.request import Result
from tests.engine.jobs import Mesh, kv_memory, request, run
from tests.engine.references import Continuation, greedy, make_model
from tests.ranks import Ranks

COUNT = 14  # tokens of each continuation
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.3, 1.5],
        "long_factor": [1.0, 2.0, 3.0, 5.0],
        "factor": 4.0,
        "original_max_position_embeddings": 24,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 24,
    },
    "proportional": {"rope_type": "proportional", "factor": 2.0, "partial_rotary_factor": 0.5},
}
NINE_OVER_THREE = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "head_dim": 8}
TRAITS: dict[str, dict[str, Any]] = {
    "nine heads over three": NINE_OVER_THREE,
    "one KV head": {"num_key_value_heads": 1},
    "head_dim of its own": {"head_dim": 12, "model_type": "qwen3"},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied head": {"tie_word_embeddings": True, "model_type": "qwen2"},
    "windows on upper layers": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
        "num_hidden_layers": 3,
    },
    "window on every layer": {"model_type": "mistral", "sliding_window": 9, "head_dim": 8},
}


def prompts_of(lengths: Sequence[int]) -> list[list[int]]:
    """Prompts that share their beginnings two by two."""
    generator = torch.Generator().manual_seed(5)
    streams = torch.randint(131, (2, max(lengths)), generator=generator).tolist()
    return [streams[index % 2][:length] for index, length in enumerate(lengths)]


def check(results: list[Result], expected: list[Continuation]) -> None:
    """Tokens, and the best logprobs at every one of them."""
    for result, continuation in zip(results, expected, strict=True):
        assert result.error is None, result.error
        largest = continuation.logits.abs().max()
        best = continuation.logits.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 2e-5 * largest, "the reference has near ties: choose another seed"
        output = result.outputs[0]
        assert output.token_ids == continuation.tokens
        logprobs = torch.log_softmax(continuation.logits.double(), dim=-1)
        for row, entry in zip(logprobs, output.logprobs or [], strict=True):
            assert len(entry.top) == 5
            for token, logprob in entry.top.items():
                assert abs(row[token] - logprob) <= 1e-4 * largest


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes a model once: its directory by the name of its trait."""

    @cache
    def make(trait: str) -> Path:
        directory = tmp_path_factory.mktemp("model")
        made = make_model(directory, **TRAITS[trait])
        assert made.config.vocab_size == 131, "not a multiple of any tp"
        return directory

    return make


@pytest.fixture(scope="module")
def expected(model: Any) -> Any:
    """Continuations by transformers, computed once for each trait."""

    @cache
    def compute(trait: str) -> list[Continuation]:
        return [greedy(model(trait), prompt, COUNT) for prompt in prompts_of((3, 31, 12, 1, 20))]

    return compute


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=2), Mesh(tp=4), Mesh(tp=2, fsdp=2)], ids=str)
@pytest.mark.parametrize("trait", list(TRAITS))
def test_traits(ranks: Ranks, model: Any, expected: Any, trait: str, mesh: Mesh) -> None:
    prompts = prompts_of((3, 31, 12, 1, 20))
    requests = [request(prompt, index, max_tokens=COUNT, logprobs=5) for index, prompt in enumerate(prompts)]
    found = run(ranks, str(model(trait)), mesh, [requests], ["engine.block_size=4", "engine.max_batch_tokens=24"])
    check(found.results[0], expected(trait))


@pytest.mark.parametrize("memory", ["ample", "tight"])
@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=2, fsdp=2)], ids=str)
@pytest.mark.parametrize("rope", list(ROPES))
def test_rotary_scalings(ranks: Ranks, tmp_path: Path, rope: str, mesh: Mesh, memory: str) -> None:
    longest = 24 if rope == "dynamic" else 96
    parameters = {"rope_theta": 10000.0, **ROPES[rope]}
    make_model(tmp_path, seed=3, max_position_embeddings=longest, rope_parameters=parameters)
    # Below the threshold of 24 tokens, across it, right at it, and beyond it; neighbours share prefixes.
    prompts = prompts_of((5, 36, 9, 12, 17, 23, 24, 25, 45, 33))
    # transformers leaves keys of the short regime in its cache when longrope switches; its whole sequence anew is what is meant.
    expected = [greedy(tmp_path, prompt, COUNT, cache=rope != "longrope") for prompt in prompts]
    overrides = ["engine.block_size=4", "engine.max_batch_tokens=20", "engine.max_model_len=64"]
    if memory == "tight":
        overrides.append(kv_memory(str(tmp_path), mesh, 4, 16))
    requests = [request(prompt, index, max_tokens=COUNT, logprobs=5) for index, prompt in enumerate(prompts)]
    found = run(ranks, str(tmp_path), mesh, [requests], overrides)
    check(found.results[0], expected)
    assert memory == "ample" or found.preemptions > 0


def test_every_rope_type_is_tested() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert set(ROPES) == {"default", *ROPE_INIT_FUNCTIONS}

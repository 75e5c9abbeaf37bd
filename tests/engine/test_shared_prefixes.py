"""Sequences that enter in one step read blocks that others fill in it: the numbers are those of sequences computed alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_infer.engine.request import Request, Result
from tests.engine.jobs import Mesh, kv_memory, request, run
from tests.engine.references import make_model
from tests.ranks import Ranks

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "windows on upper layers": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
        "num_hidden_layers": 3,
    },
    "softcaps": {"model_type": "gemma2", "head_dim": 8, "sliding_window": 9, "attn_logit_softcapping": 2.0},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}, "max_position_embeddings": 20},
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.3, 1.5],
            "long_factor": [1.0, 2.0, 3.0, 5.0],
            "factor": 4.0,
            "original_max_position_embeddings": 20,
        },
    },
    "transformers' module": {"model_type": "exaone4", "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
}
CASES = [
    # model, mesh, compiled kernels, block size, tokens a step, memory
    ("llama", Mesh(), True, 4, 512, "ample"),
    ("llama", Mesh(), False, 4, 23, "tight"),
    ("llama", Mesh(tp=2), True, 1, 512, "ample"),
    ("llama", Mesh(fsdp=2), True, 4, 64, "ample"),
    ("windows on upper layers", Mesh(), True, 4, 30, "ample"),
    ("windows on upper layers", Mesh(fsdp=2), False, 2, 512, "tight"),
    ("softcaps", Mesh(tp=2), False, 4, 512, "ample"),
    ("dynamic", Mesh(), True, 4, 512, "ample"),
    ("longrope", Mesh(), False, 4, 41, "tight"),
    ("longrope", Mesh(tp=2), True, 4, 512, "ample"),
    ("transformers' module", Mesh(), False, 4, 512, "ample"),
    ("transformers' module", Mesh(fsdp=2), False, 4, 50, "tight"),
]


def questions() -> list[Request]:
    """Choices to score and prompts to continue, whose beginnings are alike."""
    requests: list[Request] = []
    for question, length in enumerate((17, 26, 9)):
        context = [(7 * place + 11 * question) % 131 for place in range(length)]
        for choice in range(4):
            requests.append(request([*context, *[choice + 1] * (1 + choice % 3)], len(requests), score_from=length))
        requests.append(request([*context, 3], len(requests), n=3, temperature=1.0, max_tokens=6, logprobs=2))
        requests.append(request([*context, 3, 2], len(requests), max_tokens=4, logprobs=0))
    return requests


def numbers(result: Result) -> tuple[list[list[int]], list[float], bool | None]:
    """Tokens, logprobs, and whether what was scored is greedy."""
    assert result.error is None
    if result.score is not None:
        return [], result.score.token_logprobs, result.score.is_greedy
    logprobs = [entry.logprob for output in result.outputs for entry in output.logprobs or []]
    return [output.token_ids for output in result.outputs], logprobs, None


@pytest.mark.parametrize(("model", "mesh", "kernels", "block_size", "tokens", "memory"), CASES, ids=str)
def test_numbers_do_not_depend_on_sharing(
    ranks: Ranks, tmp_path: Path, model: str, mesh: Mesh, kernels: bool, block_size: int, tokens: int, memory: str
) -> None:
    make_model(tmp_path, seed=2, **MODELS[model])
    overrides = [f"engine.block_size={block_size}", f"engine.max_batch_tokens={tokens}", f"engine.native_kernels={kernels}"]
    overrides += ["engine.max_model_len=40", "loader.threads=1"]
    overrides.append(kv_memory(str(tmp_path), mesh, block_size, 40 // block_size * (1 if memory == "tight" else 30)))
    shared, alone = (run(ranks, str(tmp_path), mesh, [questions()], [*overrides, f"engine.prefix_cache={on}"]) for on in (True, False))
    assert alone.cached_tokens == 0 < shared.cached_tokens
    assert memory == "tight" or shared.cached_tokens > 3 * 4 * (9 - block_size)
    for ours, theirs in zip(map(numbers, shared.results[0]), map(numbers, alone.results[0]), strict=True):
        assert ours[0] == theirs[0] and ours[2] == theirs[2]
        assert ours[1] == pytest.approx(theirs[1], abs=1e-5)

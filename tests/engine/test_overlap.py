"""Steps that overlap give what steps one after another give: tokens, logprobs, texts, reasons and scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dist_infer.engine.request import Request, Result
from tests.engine.jobs import Mesh, kv_memory, request, run
from tests.ranks import Ranks

EXAMPLE = Path(__file__).parents[2] / "examples/quickstart"
CHECKPOINT = str(EXAMPLE / "run/step_800")
KINDS: list[dict[str, Any]] = [
    {"stop": ["."], "logprobs": 1},
    {"max_tokens": 7, "temperature": 1.0, "n": 3},
    {"max_tokens": 20, "temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "n": 2, "logprobs": 2},
    {"max_tokens": 12, "temperature": 9.0, "top_p": 0.01, "ignore_eos": True},  # most rows are decided from their full logits
    {"max_tokens": 1},
    {"max_tokens": 25, "temperature": 0.8, "stop": ["is", "e"], "min_tokens": 3},
    {},
]
SETTLED = [kind for kind in KINDS if "top_p" not in kind]  # steps of these go on without the leader


def traffic(kinds: list[dict[str, Any]]) -> list[Request]:
    """Requests of `kinds`, scored ones among them, many with a common beginning."""
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "run")
    lines = (EXAMPLE / "questions.jsonl").read_text(encoding="utf-8").splitlines()[:21]
    made: list[Request] = []
    for question in map(json.loads, lines):
        tokens = tokenizer.encode(question["prompt"])
        made.append(request(tokens, len(made), **kinds[len(made) % len(kinds)]))
        if len(made) % 5 == 0:
            made.append(request(tokens + tokenizer.encode(question["answer"]), len(made), score_from=len(tokens)))
    return made


def told(results: list[Result]) -> list[Any]:
    """What results say, all but logprobs."""
    outputs = [[(o.token_ids, o.text, o.finish_reason) for o in result.outputs] for result in results]
    return [*outputs, [(result.error, result.score and result.score.is_greedy) for result in results]]


def logprobs(results: list[Result]) -> list[float]:
    """All logprobs of `results`, in order."""
    found: list[float] = []
    for result in results:
        found += result.score.token_logprobs if result.score else []
        for entry in (entry for output in result.outputs for entry in output.logprobs or []):
            found += [entry.logprob, *entry.top.values()]
    return found


@pytest.mark.parametrize("kinds", [KINDS, SETTLED], ids=["any", "settled"])
@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=2), Mesh(fsdp=2)], ids=str)
def test_results_are_those_of_steps_one_after_another(ranks: Ranks, mesh: Mesh, kinds: list[dict[str, Any]]) -> None:
    tight = [
        "model.tokenizer=null",
        "engine.block_size=4",
        "engine.max_batch_tokens=24",
        "engine.max_sequences=8",
        "engine.max_model_len=64",
        kv_memory(CHECKPOINT, mesh, 4, 24 if kinds is KINDS else 16),
    ]
    requests = traffic(kinds)
    apart, overlapped = (run(ranks, CHECKPOINT, mesh, [requests], [*tight, f"engine.overlap={on}"]) for on in (False, True))
    assert apart.preemptions > 0 and overlapped.preemptions > 0 and overlapped.cached_tokens > 0
    assert (overlapped.resolved > 0) == (kinds is KINDS)
    assert told(overlapped.results[0]) == told(apart.results[0])
    assert logprobs(overlapped.results[0]) == pytest.approx(logprobs(apart.results[0]), abs=1e-4)
    reasons = {output.finish_reason for result in overlapped.results[0] for output in result.outputs}
    assert reasons == {"stop", "length"}

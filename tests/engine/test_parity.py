"""The engine gives the logits and the tokens of the trainers' own code, on every mesh and with every setting."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch

from dist_infer.engine.request import Request
from tests.engine.jobs import Mesh, kv_memory, request, run
from tests.engine.references import CHECKPOINTS, Reference, reference
from tests.ranks import Ranks

MESHES = [Mesh(), Mesh(tp=2), Mesh(tp=4), Mesh(fsdp=2), Mesh(fsdp=4), Mesh(tp=2, fsdp=2), Mesh(replicas=2)]
# What a case chooses from: fixture, mesh, chunked prefill, prefix cache, block size, memory, compiled kernels.
FACTORS: list[list[Any]] = [list(CHECKPOINTS), MESHES, [True, False], [True, False], [1, 3, 16, 256], ["ample", "tight"], [True, False]]
LONGEST = 64  # tokens of the longest sequence


def covering_cases() -> list[tuple[Any, ...]]:
    """Every fixture on every mesh, the other factors chosen so that every pair of values meets in some case."""
    unmet = {(a, x, b, y) for a, b in combinations(range(len(FACTORS)), 2) for x in range(len(FACTORS[a])) for y in range(len(FACTORS[b]))}
    cases = []
    for fixture in range(len(FACTORS[0])):
        for mesh in range(len(FACTORS[1])):
            case = [fixture, mesh]
            for factor in range(2, len(FACTORS)):
                values = range(len(FACTORS[factor]))
                gains = [sum((a, x, factor, y) in unmet for a, x in enumerate(case)) for y in values]
                # Equal gains: by turns.
                case.append(max(values, key=lambda y: (gains[y], (y + len(cases)) % len(values))))
            unmet -= {(a, case[a], b, case[b]) for a, b in combinations(range(len(case)), 2)}
            cases.append(tuple(FACTORS[factor][value] for factor, value in enumerate(case)))
    assert not unmet, "some pair of values meets in no case"
    return cases


def work(expected: Reference) -> tuple[list[Request], list[list[int]]]:
    """Requests of many lengths, and what each must produce: every part of a greedy continuation continues as the whole does."""
    requests, tokens = [], []
    for known in (0, 2, 5, 9, 14, 20):
        for prompt, greedy in zip(expected.inputs, expected.greedy, strict=True):
            requests.append(request(prompt + greedy[:known], len(requests), max_tokens=24 - known, ignore_eos=True))
            tokens.append(greedy[known:])
    return requests, tokens


@pytest.mark.parametrize(("name", "mesh", "chunked", "prefix_cache", "block_size", "memory", "kernels"), covering_cases(), ids=str)
def test_logits_and_greedy_tokens(
    ranks: Ranks, name: str, mesh: Mesh, chunked: bool, prefix_cache: bool, block_size: int, memory: str, kernels: bool
) -> None:
    expected = reference(name)
    requests, tokens = work(expected)
    blocks = -(-LONGEST // block_size) * (1 if memory == "tight" else len(requests))
    overrides = [
        f"engine.block_size={block_size}",
        f"engine.chunked_prefill={chunked}",
        f"engine.prefix_cache={prefix_cache}",
        f"engine.native_kernels={kernels}",
        f"engine.max_model_len={LONGEST}",
        f"engine.max_batch_tokens={13 if chunked else 48}",
        kv_memory(expected.path, mesh, block_size, blocks),
    ]
    again = [request(prompt, index, max_tokens=3, ignore_eos=True) for index, prompt in enumerate(expected.inputs)]
    found = run(ranks, expected.path, mesh, [requests, again], overrides, prompts=expected.inputs)

    for logits, copies in zip(expected.logits, found.logits, strict=True):
        for copy in copies:
            assert (torch.from_numpy(copy) - logits).abs().max() <= 1e-4 * logits.abs().max()
    assert found.tokens(0) == tokens
    assert found.tokens(1) == [greedy[:3] for greedy in expected.greedy]
    # A sequence of one block never grows.
    assert (found.preemptions > 0) == (memory == "tight" and block_size < LONGEST)
    assert prefix_cache or not found.cached_tokens

"""A seed means the same tokens whatever the mesh, the batch and the limits; logprobs are the model's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from dist_infer.engine.request import Request
from tests.engine.jobs import Mesh, kv_memory, request, run
from tests.engine.references import make_model
from tests.ranks import Ranks

VOCABULARY = 2003
SEQUENCES, LENGTH = 500, 10  # 5,000 tokens of each kind; short, so that one flip does not carry far
KINDS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.0},
    "top-k": {"temperature": 0.9, "top_k": 50},
    "top-p": {"temperature": 1.0, "top_p": 0.95},
    "min-p": {"temperature": 1.2, "min_p": 0.2},
    "penalties": {
        "temperature": 0.8,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.7,
        "logit_bias": {5: 1.5, 1999: 2.0},
        "top_k": 400,
    },
}


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, PreTrainedModel]:
    """A model whose logits are flat: its 0.95 nucleus holds most of the vocabulary."""
    directory = tmp_path_factory.mktemp("flat")
    model = make_model(directory, std=0.12, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_attention_heads=4)
    with torch.no_grad():
        probabilities = model(torch.tensor([[1, 2, 3]])).logits[0, -1].softmax(0).sort(descending=True).values
    assert int((probabilities.cumsum(0) < 0.95).sum()) > VOCABULARY // 2
    return str(directory), model


def requests_of(kind: str, count: int = SEQUENCES) -> list[Request]:
    """Requests of one kind, with prompts of one to nine tokens."""
    generator = torch.Generator().manual_seed(len(kind))
    made = []
    for index in range(count):
        prompt = torch.randint(VOCABULARY, (1 + index % 9,), generator=generator).tolist()
        made.append(request(prompt, index, max_tokens=LENGTH, ignore_eos=True, **KINDS[kind]))
    return made


def numbered(requests: Sequence[Request]) -> list[Request]:
    """The same requests, as one list."""
    return [Request(str(index), r.token_ids, r.params, r.seed, index=index) for index, r in enumerate(requests)]


def flips(found: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> tuple[int, int]:
    """How many sequences part, and how many tokens they had in common or parted at."""
    parted = compared = 0
    for ours, theirs in zip(found, expected, strict=True):
        assert len(ours) == len(theirs) == LENGTH
        first = next((place for place, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        parted += first is not None
        compared += LENGTH if first is None else first + 1
    return parted, compared


@pytest.fixture(scope="module")
def expected(ranks: Ranks, flat: tuple[str, PreTrainedModel]) -> list[list[int]]:
    """The tokens of all kinds, each kind by itself on one rank, few at a time."""
    overrides = ["engine.max_sequences=32", "engine.max_batch_tokens=64"]
    one = run(ranks, flat[0], Mesh(), [requests_of(kind) for kind in KINDS], overrides, timeout_s=180)
    return [tokens for batch in range(len(KINDS)) for tokens in one.tokens(batch)]


@pytest.mark.parametrize(
    ("mesh", "overrides"),
    [
        (Mesh(), ("engine.max_sequences=200",)),
        (Mesh(tp=2), ("engine.max_sequences=96",)),
        (Mesh(tp=4), ("engine.max_sequences=128", "engine.max_batch_tokens=50", "engine.block_size=3")),
        (Mesh(fsdp=2), ("engine.max_sequences=64", "engine.prefix_cache=false")),
    ],
    ids=["one rank", "tp=2", "tp=4", "fsdp=2"],
)
def test_same_tokens_on_every_mesh_and_among_any_neighbours(
    ranks: Ranks, flat: tuple[str, PreTrainedModel], expected: list[list[int]], mesh: Mesh, overrides: tuple[str, ...]
) -> None:
    together = [one for kind in KINDS for one in requests_of(kind)]
    order = torch.randperm(len(together), generator=torch.Generator().manual_seed(1)).tolist()  # all kinds side by side
    found = run(ranks, flat[0], mesh, [numbered([together[place] for place in order])], overrides, timeout_s=180).tokens()
    total = 0
    for kind in KINDS:
        ours, theirs = zip(*((tokens, expected[place]) for tokens, place in zip(found, order, strict=True) if place // SEQUENCES == list(KINDS).index(kind)), strict=True)
        parted, compared = flips(ours, theirs)
        print(f"{kind}: {parted} of {compared} tokens differ")
        total += parted
    assert total <= 4, "float32 rounding flips about one token in 30,000"


def test_same_tokens_alone(ranks: Ranks, flat: tuple[str, PreTrainedModel], expected: list[list[int]]) -> None:
    for place, kind in enumerate(KINDS):
        found = run(ranks, flat[0], Mesh(tp=2), [requests_of(kind, 20)], ["engine.max_sequences=1"]).tokens()
        assert found == expected[place * SEQUENCES :][:20]

"""A seed means the same tokens whatever the mesh, the batch and the limits; logprobs are the model's own."""

from __future__ import annotations

from collections.abc import Sequence
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
    for number, kind in enumerate(KINDS):
        places = [(at, place) for at, place in enumerate(order) if place // SEQUENCES == number]
        parted, compared = flips([found[at] for at, _ in places], [expected[place] for _, place in places])
        print(f"{kind}: {parted} of {compared} tokens differ")
        total += parted
    assert total <= 4, "float32 rounding flips about one token in 30,000"


def test_same_tokens_alone(ranks: Ranks, flat: tuple[str, PreTrainedModel], expected: list[list[int]]) -> None:
    for place, kind in enumerate(KINDS):
        found = run(ranks, flat[0], Mesh(tp=2), [requests_of(kind, 20)], ["engine.max_sequences=1"]).tokens()
        assert found == expected[place * SEQUENCES :][:20]


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_forks_are_what_separate_sequences_would_be(ranks: Ranks, flat: tuple[str, PreTrainedModel], block_size: int) -> None:
    """`n` outputs share their prompt's blocks where they run side by side; with one sequence at a time none can."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in (1, 4, 5, 16, 23)]
    forked = [request(prompt, index, n=4, max_tokens=9, temperature=1.0, top_p=0.9) for index, prompt in enumerate(prompts)]
    single = [request(prompt, index, n=1, max_tokens=9, temperature=1.0, top_p=0.9) for index, prompt in enumerate(prompts)]
    common = [f"engine.block_size={block_size}", "engine.prefix_cache=false", "engine.max_model_len=32"]
    apart = run(ranks, flat[0], Mesh(), [forked], [*common, "engine.max_sequences=1"])
    expected = [[output.token_ids for output in result.outputs] for result in apart.results[0]]
    assert all(len({tuple(tokens) for tokens in outputs}) == 4 for outputs in expected), "the outputs of a request repeat each other"
    assert apart.prefill_tokens == 4 * sum(len(prompt) for prompt in prompts if len(prompt) > 1)

    tight = kv_memory(flat[0], Mesh(fsdp=2), block_size, 2 * 32 // block_size)
    for mesh, overrides in [(Mesh(), ()), (Mesh(tp=2), ("engine.max_batch_tokens=7",)), (Mesh(fsdp=2), (tight,))]:
        found = run(ranks, flat[0], mesh, [forked, single], [*common, *overrides])
        assert [[output.token_ids for output in result.outputs] for result in found.results[0]] == expected
        assert [result.outputs[0].token_ids for result in found.results[1]] == [outputs[0] for outputs in expected]
        if not overrides:  # the prompts were computed once for each request, not for each output
            assert found.prefill_tokens == 2 * sum(len(prompt) for prompt in prompts if len(prompt) > 1)
        assert (found.preemptions > 0) == (tight in overrides)


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(tp=4), Mesh(tp=2, fsdp=2)], ids=str)
def test_logprobs_and_scores_are_the_models_own(ranks: Ranks, flat: tuple[str, PreTrainedModel], mesh: Mesh) -> None:
    """Whatever temperature, filters, penalties and biases do to the choice, logprobs are of the raw logits."""
    path, model = flat
    settings = [{}, *KINDS.values(), {"temperature": 1.0, "top_p": 0.1}, {"temperature": 3.0, "logit_bias": {7: 50.0}}]
    requests = []
    for index, sampling in enumerate(settings):
        requests.append(request([11, 3 * index, 2001][: 1 + index % 3], index, max_tokens=12, logprobs=index % 4, **sampling))
    sampled = run(ranks, path, mesh, [requests], ["engine.max_batch_tokens=8"]).results[0]
    scored = []
    for made, result in zip(requests, sampled, strict=True):
        output = result.outputs[0]
        prompt = made.token_ids
        with torch.no_grad():
            logits = model(torch.tensor([prompt + output.token_ids])).logits[0, len(prompt) - 1 : -1]
        logprobs = torch.log_softmax(logits.double(), dim=-1)
        assert output.logprobs is not None
        for row, token, entry in zip(logprobs, output.token_ids, output.logprobs, strict=True):
            assert entry.token_id == token and abs(entry.logprob - row[token]) < 1e-5
            best = row.topk(max(made.params.logprobs or 0, 1))
            assert list(entry.top) == best.indices.tolist()[: made.params.logprobs]
            assert all(abs(row[other] - value) < 1e-5 for other, value in entry.top.items())
        ends = len(prompt) + (made.index % 2) * 3
        scored.append((request(prompt + output.token_ids, made.index, score_from=ends), logprobs[ends - len(prompt) :]))
    found = run(ranks, path, mesh, [[one for one, _ in scored]], ["engine.max_batch_tokens=9"]).results[0]
    for (made, logprobs), result in zip(scored, found, strict=True):
        assert made.score_from is not None and result.score is not None
        targets = torch.tensor(made.token_ids[made.score_from :])
        wanted = logprobs.gather(1, targets[:, None])[:, 0]
        assert (torch.tensor(result.score.token_logprobs) - wanted).abs().max() < 1e-5
        assert abs(result.score.logprob - wanted.sum()) < 1e-4
        assert result.score.is_greedy == bool((logprobs.argmax(-1) == targets).all())
    assert found[0].score is not None and found[0].score.is_greedy, "the greedy request's own tokens"

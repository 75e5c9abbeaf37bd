"""The sharded sampler against the slow one, on ordinary and on hostile logits."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from sampling_reference import reference_token, run_sharded

from dist_infer.sampling.sampler import Decisions
from dist_infer.sampling.slots import SlotParams
from dist_infer.sampling.summary import NOISED, SHORTLIST, SummaryLayout

SHARDS = (1, 2, 3, 4, 8)
VOCAB = 301


def logits_of(kind: str, rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    flat = torch.randn(rows, vocab)
    if kind == "flat":
        return flat
    if kind == "equal":
        return torch.full((rows, vocab), 1.5)
    if kind == "ties":
        return (flat * 0.5).to(torch.bfloat16).float().mul(4).round().div(4)
    if kind == "zeros":  # both zeros are the same number
        return torch.where(torch.rand(rows, vocab) < 0.5, 0.0, -0.0)
    if kind == "peaked":
        return flat * 12
    if kind == "banned":  # whole slices hold nothing
        flat[:, : vocab // 2 + 7] = float("-inf")
        return flat
    if kind == "few":  # fewer tokens than any top_k
        few = torch.full((rows, vocab), float("-inf"))
        few[:, [3, vocab // 2, vocab - 1]] = flat[:, :3]
        return few
    assert kind == "wide"  # far more than the histogram spans
    return flat * 40


def draw_params(rng: random.Random, vocab: int, row: int) -> SlotParams:
    pick = rng.choice
    return SlotParams(
        seed=rng.getrandbits(63),
        sequence=rng.randrange(3),
        prompt_len=5,
        temperature=pick([0.0, 0.3, 0.7, 1.0, 1.0, 1.7]),
        top_k=pick([0, 0, 0, 1, 2, 40, SHORTLIST, SHORTLIST + 1, 120, vocab, 10 * vocab]),
        top_p=pick([1.0, 1.0, 0.999, 0.95, 0.5, 0.1, 1e-4]),
        min_p=pick([0.0, 0.0, 0.05, 0.5, 1.0]),
        repetition_penalty=pick([1.0, 1.0, 1.3, 0.8]),
        presence_penalty=pick([0.0, 0.0, 1.5, -0.5]),
        frequency_penalty=pick([0.0, 0.0, 0.7, -0.3]),
        min_tokens=pick([0, 3, 9]),
        banned=(0, vocab // 2, vocab - 1),
        logit_bias=pick([(), (), ((1, 5.0), (vocab - 2, -3.0), (vocab // 3, 2.5))]),
        logprobs=pick([-1, -1, 0, 4]) if row % 2 else -1,
    )


@pytest.mark.parametrize("kind", ["flat", "equal", "ties", "zeros", "peaked", "banned", "few", "wide"])
def test_all_features_together_match_the_reference(kind: str) -> None:
    rng = random.Random(kind)
    rows = 40
    logits = logits_of(kind, rows, VOCAB)
    params = [draw_params(rng, VOCAB, row) for row in range(rows)]
    if kind == "few":  # else nothing is left
        params = [replace(p, banned=(3,)) for p in params]
    prompts = [[rng.randrange(VOCAB) for _ in range(5)] for _ in range(rows)]
    outputs = [[rng.choice([rng.randrange(VOCAB), 7]) for _ in range(rng.randrange(12))] for _ in range(rows)]
    positions = [5 + len(output) for output in outputs]
    expected = [reference_token(logits[r], params[r], positions[r], prompts[r], outputs[r]) for r in range(rows)]
    logprobs = logits.double().log_softmax(1)
    for shards in SHARDS:
        tokens, decisions = run_sharded(logits, params, positions, shards, prompts, outputs)
        assert tokens == expected, f"{shards} shards"
        assert decisions.invalid == []
        given = [decisions.logprobs[r] for r in range(rows) if params[r].logprobs >= 0]
        assert given == pytest.approx([logprobs[r, expected[r]].item() for r in range(rows) if params[r].logprobs >= 0], abs=1e-4)


@pytest.mark.parametrize("features", [{"top_k": 50}, {"top_k": 200}, {"top_p": 0.6}, {"top_p": 0.9, "top_k": 100}, {"min_p": 0.3}, {}])
@pytest.mark.parametrize("kind", ["flat", "ties", "equal", "peaked"])
def test_each_filter_alone_matches_the_reference(kind: str, features: dict[str, float]) -> None:
    """A batch of one kind of row has a narrower layout than a mixed one."""
    rows = 12
    logits = logits_of(kind, rows, VOCAB, seed=1)
    params = [SlotParams(seed=row, temperature=0.9, **features) for row in range(rows)]
    expected = [reference_token(logits[r], params[r], r) for r in range(rows)]
    for shards in SHARDS:
        assert run_sharded(logits, params, range(rows), shards)[0] == expected, f"{shards} shards"


@pytest.mark.parametrize("kind", ["flat", "ties", "zeros", "equal", "banned"])
def test_greedy_rows_take_the_first_of_the_best(kind: str) -> None:
    logits = logits_of(kind, 12, VOCAB, seed=2)
    logits[4, VOCAB - 1] = float("nan")
    logits[7] = float("-inf")
    expected = [-1 if row in (4, 7) else int(logits[row].numpy().argmax()) for row in range(12)]
    for shards in SHARDS:
        tokens, decisions = run_sharded(logits, [SlotParams()] * 12, range(12), shards)
        assert (tokens, decisions.invalid) == (expected, [4, 7]), f"{shards} shards"


@pytest.mark.parametrize("features", [{}, {"top_k": 50}, {"top_k": 200}, {"top_p": 0.5}, {"min_p": 1e-30}])
def test_logits_so_great_that_noise_rounds_to_ties_match_the_reference(features: dict[str, float]) -> None:
    rows = 12
    logits = 1e5 + torch.randint(0, 3, (rows, VOCAB)) / 128.0
    params = [SlotParams(seed=row, temperature=1e-3, **features) for row in range(rows)]
    expected = [reference_token(logits[r], params[r], r) for r in range(rows)]
    for shards in SHARDS:
        assert run_sharded(logits, params, range(rows), shards)[0] == expected, f"{shards} shards"


def test_a_kept_token_that_no_summary_holds_is_not_passed_over() -> None:
    """One shard's best noised tokens are all refused by min_p, and the kept one it holds is far below them."""
    rows, vocab = 30, 4000
    logits = torch.zeros(rows, vocab)
    logits[:, vocab // 2 :] = -5.0
    logits[:, [7, vocab - 7]] = 0.5
    params = [SlotParams(seed=1, temperature=1.0, min_p=1.0)] * rows
    expected = [reference_token(logits[r], params[r], r) for r in range(rows)]
    assert set(expected) == {7, vocab - 7}
    for shards in (1, 2, 4):
        assert run_sharded(logits, params, range(rows), shards)[0] == expected


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_probability_before_a_token_must_be_less_than_top_p(shards: int) -> None:
    for top_p, kept in ((0.25, {0, 1}), (0.26, {0, 1, 2}), (1e-9, {0})):
        params = [SlotParams(seed=1, temperature=1.0, top_p=top_p)] * 100
        assert set(run_sharded(torch.zeros(100, 8), params, range(100), shards)[0]) == kept


@pytest.mark.parametrize("features", [{}, {"top_k": 50}, {"top_k": 1000}, {"top_p": 0.95}, {"min_p": 0.05}])
def test_thousands_of_tokens_are_the_same_for_any_number_of_shards(features: dict[str, float]) -> None:
    vocab, rows, batches = 4001, 250, 20
    for batch in range(batches):
        logits = logits_of("flat", rows, vocab, seed=batch)
        params = [SlotParams(seed=11, temperature=1.0, **features)] * rows
        positions = range(batch * rows, (batch + 1) * rows)
        tokens = [run_sharded(logits, params, positions, shards)[0] for shards in (1, 2, 4)]
        assert tokens[0] == tokens[1] == tokens[2]


@pytest.mark.parametrize(
    ("features", "most"),
    [({}, 0), ({"top_k": 50}, 0), ({"min_p": 0.05}, 0), ({"top_p": 0.95}, 0.02), ({"top_k": 1000}, 0.12), ({"top_p": 0.1}, 0.15)],
)
def test_few_rows_need_their_full_logits(features: dict[str, float], most: float) -> None:
    rows = 200
    logits = logits_of("flat", rows, 32000)
    params = [SlotParams(seed=5, temperature=1.0, **features)] * rows
    decisions = run_sharded(logits, params, range(rows), 4)[1]
    assert len(decisions.unresolved) <= most * rows


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rng = random.Random(3)
    rows = 24
    logits = logits_of("ties", rows, VOCAB, seed=2)
    params = [
        replace(draw_params(rng, VOCAB, row), repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0) for row in range(rows)
    ]
    together = run_sharded(logits, params, range(5, 5 + rows), 2)[0]
    alone = [run_sharded(logits[r : r + 1], params[r : r + 1], [5 + r], 2)[0][0] for r in range(rows)]
    assert together == alone


def test_logprobs_are_raw_whatever_the_path() -> None:
    rows = 8
    logits = logits_of("flat", rows, VOCAB, seed=4)
    base = SlotParams(seed=1, temperature=0.8, logprobs=3, logit_bias=((9, 30.0), (10, 29.0), (200, 30.5)))
    paths = [base, replace(base, temperature=0.0), replace(base, top_k=5), replace(base, top_p=0.5), replace(base, top_k=100, logprobs=0)]
    params = [*paths, replace(base, logprobs=-1), base, base]
    expected = logits.double().log_softmax(1)
    for shards in SHARDS:
        tokens, decisions = run_sharded(logits, params, range(rows), shards)
        for r, p in enumerate(params):
            if p.logprobs < 0:
                assert decisions.logprobs[r] is None
                assert decisions.top_logprobs[r] == []
                continue
            assert decisions.logprobs[r] == pytest.approx(expected[r, tokens[r]].item(), abs=1e-5)
            best = expected[r].sort(descending=True, stable=True)
            assert [i for i, _ in decisions.top_logprobs[r]] == best.indices[: p.logprobs].tolist()
            assert [v for _, v in decisions.top_logprobs[r]] == pytest.approx(best.values[: p.logprobs].tolist(), abs=1e-5)


def test_a_small_vocabulary_has_no_more_top_logprobs_than_tokens() -> None:
    decisions = run_sharded(torch.randn(1, 5), [SlotParams(logprobs=9)], [0], 4)[1]
    assert sorted(i for i, _ in decisions.top_logprobs[0]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("shards", SHARDS)
def test_scored_rows_give_the_target_beside_sampled_rows(shards: int) -> None:
    logits = logits_of("ties", 6, VOCAB, seed=5)
    logits[1, [50, 250]] = 20.0  # as good as the best, but not the first
    best = [max(range(VOCAB), key=lambda t: (logits[r, t].item(), -t)) for r in range(6)]
    targets = [best[0], 250, 0, VOCAB - 1, -1, -1]
    drawn = SlotParams(seed=3, temperature=1.0, top_p=0.9)
    params = [SlotParams(), SlotParams(logit_bias=((4, 50.0),)), SlotParams(), SlotParams(), drawn, replace(drawn, logprobs=0)]
    tokens, decisions = run_sharded(logits, params, range(6), shards, targets=targets)
    logprobs = logits.double().log_softmax(1)
    assert tokens[:4] == [-1] * 4
    assert [tokens[r] for r in (4, 5)] == [reference_token(logits[r], params[r], r) for r in (4, 5)]
    assert decisions.is_greedy[:4] == [True, False, targets[2] == best[2], targets[3] == best[3]]
    assert decisions.logprobs[:4] == pytest.approx([logprobs[r, targets[r]].item() for r in range(4)], abs=1e-5)
    assert decisions.logprobs[4] is None
    assert decisions.logprobs[5] == pytest.approx(logprobs[5, tokens[5]].item(), abs=1e-5)


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_rows_without_a_finite_choice_are_named(shards: int) -> None:
    logits = torch.randn(5, VOCAB)
    logits[1, 200] = float("nan")
    logits[2] = float("-inf")
    logits[3, 0] = float("inf")
    decisions = run_sharded(logits, [SlotParams(seed=1, temperature=1.0, top_p=0.9, logprobs=2)] * 4 + [SlotParams()], range(5), shards)[1]
    assert decisions.invalid == [1, 2, 3]
    assert [decisions.tokens[r] for r in (1, 2, 3)] == [-1] * 3
    assert [decisions.logprobs[r] for r in (1, 2, 3)] == [None] * 3


def test_layout_holds_what_the_rows_need_and_no_more() -> None:
    greedy, plain = SlotParams(), SlotParams(temperature=1.0)
    assert SummaryLayout.for_rows([greedy, greedy], False).width == 2
    assert SummaryLayout.for_rows([greedy], True).width == 5
    assert SummaryLayout.for_rows([plain], False) == SummaryLayout(noised=1)
    assert SummaryLayout.for_rows([plain, replace(plain, top_k=7)], False) == SummaryLayout(shortlist=7, noised=1)
    assert SummaryLayout.for_rows([replace(plain, min_p=0.1)], False) == SummaryLayout(noised=NOISED)
    likely = replace(plain, top_p=0.9)  # six in a row are refused once in a million times, and a seventh says only where knowledge ends
    assert SummaryLayout.for_rows([likely], False) == SummaryLayout(noised=7, masses=True)
    for least in (0.01, 1e-320):
        assert SummaryLayout.for_rows([replace(plain, top_p=least)], False) == SummaryLayout(noised=NOISED, masses=True)
    mixed = [replace(plain, top_p=0.9, logprobs=2), replace(plain, top_k=SHORTLIST + 1), greedy]
    assert SummaryLayout.for_rows(mixed, False) == SummaryLayout.for_rows(mixed[::-1], False)
    assert SummaryLayout.for_rows(mixed, False) == SummaryLayout(noised=NOISED, logprobs=2, masses=True, counts=True)


def test_no_rows_are_no_trouble() -> None:
    tokens, decisions = run_sharded(torch.empty(0, VOCAB), [], [], 2)
    assert tokens == []
    assert decisions == Decisions([], [], [], [], [], [])

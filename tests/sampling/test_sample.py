"""The plain function for loops of one's own."""

from __future__ import annotations

import pytest
import torch

from dist_infer.config.sampling import SamplingParams
from dist_infer.sampling.sample import sample


def test_greedy_needs_no_seed_and_leaves_logits_alone() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 0.0]], dtype=torch.bfloat16)
    before = logits.clone()
    assert sample(logits, SamplingParams(logit_bias={0: -9.0}), [3, 4]).tolist() == [1, 1]
    assert torch.equal(logits, before)


def test_a_row_is_drawn_alike_alone_and_in_a_batch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 500)
    params = [SamplingParams(temperature=1.0, **extra) for extra in ({}, {"top_k": 100}, {"top_p": 0.3}, {"min_p": 0.1}, {"top_k": 9}, {})]
    together = sample(logits, params, range(6), range(10, 16))
    alone = [sample(logits[r : r + 1], params[r : r + 1], [r], [10 + r])[0] for r in range(6)]
    assert together.tolist() == [int(token) for token in alone]


def test_rows_of_one_seed_are_drawn_apart() -> None:
    logits = torch.zeros(50, 1000)
    by_argument = sample(logits, SamplingParams(temperature=1.0), [7] * 50, 3)
    assert len(by_argument.unique()) > 40
    assert torch.equal(by_argument, sample(logits, SamplingParams(temperature=1.0, seed=3), [7] * 50))


def test_penalties_and_min_tokens_look_at_prompt_and_output() -> None:
    logits = torch.tensor([[3.0, 2.9, 2.8, 2.7]]).repeat(2, 1)
    params = SamplingParams(repetition_penalty=2.0, min_tokens=2)
    tokens = sample(logits, params, [2, 3], prompts=[[0], [0]], outputs=[[1], [2, 2]], eos_ids=[2])
    assert tokens.tolist() == [3, 1]


def test_end_tokens_come_after_min_tokens_and_not_before() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]]).repeat(4, 1)
    outputs = [[0] * count for count in range(4)]
    params = SamplingParams(min_tokens=2, stop_token_ids=[1])
    assert sample(logits, params, [5, 6, 7, 8], prompts=[[0] * 5] * 4, outputs=outputs).tolist() == [2, 2, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"positions": [0]}, "positions for 1 rows: there are 2"),
        ({"params": SamplingParams(temperature=1.0)}, "row 0 draws at temperature 1.0 without a seed"),
        ({"params": SamplingParams(presence_penalty=1.0)}, "give prompts and outputs"),
        ({"params": SamplingParams(stop_token_ids=[7])}, "token id 7"),
        ({"logits": torch.zeros(4)}, r"logits of shape \[4\]"),
        ({"logits": torch.full((2, 4), float("nan"))}, "logits of row 0"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"logits": torch.zeros(2, 4), "params": SamplingParams(), "positions": [0, 0]}
    with pytest.raises(ValueError, match=message):
        sample(**{**good, **arguments})  # type: ignore[arg-type]

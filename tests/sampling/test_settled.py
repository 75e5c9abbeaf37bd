"""What ranks settle by themselves is what the leader decides from the same summaries."""

from __future__ import annotations

import pytest
import torch
from sampling_reference import summarize_sharded
from test_sampler import SHARDS, VOCAB, logits_of
from torch import Tensor

from dist_infer.distributed.collectives import SingleRank
from dist_infer.sampling.sampler import decide
from dist_infer.sampling.settled import settle
from dist_infer.sampling.slots import SlotParams
from dist_infer.sampling.summary import SummaryLayout


class Group(SingleRank):
    """Ranks whose sums are made in two rounds: of what each brought in the first, which it may not look at yet."""

    def __init__(self, size: int) -> None:
        self.size, self.brought = size, dict[int, Tensor]()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of all, once all have come."""
        self.brought.setdefault(self.rank, tensor.clone())
        total = torch.stack(list(self.brought.values())).sum(0)
        return tensor.copy_(total)


def settle_sharded(summaries: list[Tensor], layout: SummaryLayout, params: list[SlotParams]) -> list[list[int]]:
    """Tokens of the rows, as each rank finds them out."""
    drawn = torch.tensor([[not p.greedy] for p in params]) if layout.noised else None
    group, found = Group(len(summaries)), []
    for _ in range(2):
        found = []
        for group.rank, summary in enumerate(summaries):
            found.append(settle(summary, layout, drawn, group, VOCAB).tolist())
    return found


@pytest.mark.parametrize("kind", ["flat", "equal", "ties", "zeros", "peaked", "banned", "few", "wide"])
@pytest.mark.parametrize("features", ["greedy", "drawn", "both", "with logprobs"])
def test_all_ranks_settle_what_the_leader_decides(kind: str, features: str) -> None:
    rows = 24
    logits = logits_of(kind, rows, VOCAB, seed=3)
    logits[4, VOCAB - 1] = float("nan")
    logits[7] = float("-inf")
    temperatures = {"greedy": [0.0], "drawn": [1.0, 0.3, 5.0]}.get(features, [0.0, 0.8, 1e-3, 2.0])
    logprobs = 3 if features == "with logprobs" else -1
    params = [SlotParams(seed=row, temperature=temperatures[row % len(temperatures)], logprobs=logprobs) for row in range(rows)]
    for shards in SHARDS:
        layout, summaries, _ = summarize_sharded(logits, params, range(rows), shards)
        assert layout.settled
        decided = decide(layout, summaries, params, range(rows))
        assert decided.invalid == [4, 7] and not decided.unresolved
        for tokens in settle_sharded(summaries, layout, params):
            assert all(0 <= token < VOCAB for token in tokens)
            finite = [row for row in range(rows) if row not in decided.invalid]
            assert [tokens[row] for row in finite] == [decided.tokens[row] for row in finite], f"{shards} shards"


@pytest.mark.parametrize("features", [{"top_k": 5}, {"top_k": 100}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_filters_are_the_leaders_to_judge(features: dict[str, float]) -> None:
    assert not SummaryLayout.for_rows([SlotParams(), SlotParams(temperature=1.0, **features)], False).settled

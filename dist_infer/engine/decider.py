"""From what the ranks answer to the tokens and scores of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dist_infer.distributed.mesh import MeshShape
from dist_infer.engine.runner import Answer
from dist_infer.engine.scheduler import Entry
from dist_infer.engine.sequence import Sequence
from dist_infer.model.weights import cut
from dist_infer.sampling.sampler import Decisions, decide, resolve

FullRows = Callable[[list[tuple[int, int]]], list[Answer]]


@dataclass(frozen=True)
class Decided:
    """The decided rows of one fsdp coordinate.

    Attributes:
        rows: Sequence, and position of the token decided or scored.
        made: What was found for each.
    """

    rows: list[tuple[Sequence, int]]
    made: Decisions


class Decider:
    """Decides the rows of every step.

    Args:
        shape: Whose ranks answer.
        vocab_size: Cut over the tp ranks.
        full_rows: Asks the ranks for the full logits of rows (owner, row) of the step they answered last.
    """

    def __init__(self, shape: MeshShape, vocab_size: int, full_rows: FullRows) -> None:
        self._tp, self._fsdp, self._full_rows = shape.tp, shape.fsdp, full_rows
        self._slices = [cut(vocab_size, shape.tp, rank) for rank in range(shape.tp)]

    def decide(self, entries: list[Entry], answers: list[Answer] | None) -> list[Decided]:
        """Decide all rows of the step of `entries`; of no answers, none."""
        if answers is None:
            return []
        layout = answers[0].layout
        assert layout is not None
        decided: list[tuple[int, Decided]] = []
        for owner, rows in enumerate(self._rows(entries)):
            if rows:
                summaries = [answer.values[: len(rows)] for answer in self._shards(answers, owner)]
                params = [sequence.slot_params for sequence, _ in rows]
                positions = [position for _, position in rows]
                targets = [sequence.tokens[position] if sequence.scored else -1 for sequence, position in rows] if layout.targets else None
                decided.append((owner, Decided(rows, decide(layout, summaries, params, positions, targets))))
        unresolved = [(owner, row, part) for owner, part in decided for row in part.made.unresolved]
        if unresolved:
            self._resolve(unresolved)
        return [part for _, part in decided]

    def _resolve(self, unresolved: list[tuple[int, int, Decided]]) -> None:
        """Decide the rows (owner, row, its part) that their summaries left open."""
        answers = self._full_rows([(owner, row) for owner, row, _ in unresolved])
        taken = [0] * self._fsdp
        for owner, row, part in unresolved:
            shards = [answer.values[taken[owner]] for answer in self._shards(answers, owner)]
            taken[owner] += 1
            slices = [shard[:, : stop - first] for shard, (first, stop) in zip(shards, self._slices, strict=True)]
            processed, raw = torch.cat(slices, dim=1)
            sequence, position = part.rows[row]
            found = resolve(processed, raw if sequence.slot_params.logprobs >= 0 else None, sequence.slot_params, position)
            part.made.tokens[row], part.made.logprobs[row] = found.token, found.logprob

    def _rows(self, entries: list[Entry]) -> list[list[tuple[Sequence, int]]]:
        """Of each fsdp coordinate the rows of logits, in order: sequence and position of the token decided or scored."""
        rows: list[list[tuple[Sequence, int]]] = [[] for _ in range(self._fsdp)]
        for entry in entries:
            end = entry.end
            if entry.rows == 1:
                rows[entry.owner].append((entry.sequence, end))
            else:
                rows[entry.owner] += [(entry.sequence, position) for position in range(end + 1 - entry.rows, end + 1)]
        return rows

    def _shards(self, answers: list[Answer], owner: int) -> list[Answer]:
        """The answers of one fsdp coordinate's tp ranks."""
        return answers[owner * self._tp : (owner + 1) * self._tp]

"""What changes logits before temperature: penalties, biases, bans; in that order, in place.

Repetition penalty, then frequency and presence, then logit bias, then the ban of end tokens before
`min_tokens`. A feature that no row uses touches nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_infer.model.transfer import to_device
from dist_infer.sampling.slots import Rows, SlotParams, SlotTable


def changes(rows: Rows, params: Sequence[SlotParams]) -> bool:
    """Whether any sampled row has a penalty, a bias or a ban in force."""
    return any(rows.sampled(r) and (p.needs_tokens or p.logit_bias or _banning(p, rows.positions[r])) for r, p in enumerate(params))


def process(logits: Tensor, rows: Rows, params: Sequence[SlotParams], table: SlotTable) -> None:
    """Apply every processor to the sampled rows of `logits` [R, vocab_local] float32, in place."""
    sampled = [r for r in range(len(rows)) if rows.sampled(r)]
    _penalize(logits, [r for r in sampled if params[r].needs_tokens], rows, params, table)
    first, last = table.first_token, table.first_token + table.vocab_local
    biases = [(r, i - first, b) for r in sampled for i, b in params[r].logit_bias if first <= i < last]
    if biases:
        at_row, at_id, addend = zip(*biases, strict=True)
        index = (to_device(at_row, logits.device), to_device(at_id, logits.device))
        logits[index] += to_device(addend, logits.device, torch.float32)
    bans = [(r, i - first) for r in sampled if _banning(params[r], rows.positions[r]) for i in params[r].banned if first <= i < last]
    if bans:
        at_row, at_id = to_device(bans, logits.device).T
        logits[at_row, at_id] = float("-inf")


def _banning(params: SlotParams, position: int) -> bool:
    """Whether end tokens are still banned at `position`."""
    return bool(params.banned) and position - params.prompt_len < params.min_tokens


def _penalize(logits: Tensor, which: list[int], rows: Rows, params: Sequence[SlotParams], table: SlotTable) -> None:
    """Apply the penalties of the rows `which`."""
    if not which:
        return

    def column(values: list[float]) -> Tensor:
        return to_device(values, logits.device, torch.float32)[:, None]

    at = to_device(which, logits.device)
    counts, in_prompt = table.tokens_of(to_device([rows.slots[r] for r in which], logits.device))
    produced = counts > 0
    repetition = column([params[r].repetition_penalty for r in which])
    some = logits[at]
    punished = torch.where(some > 0, some / repetition, some * repetition)
    some = torch.where(in_prompt | produced, punished, some)
    some -= column([params[r].frequency_penalty for r in which]) * counts
    some -= column([params[r].presence_penalty for r in which]) * produced
    logits[at] = some

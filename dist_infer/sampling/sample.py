"""Sampling for loops of one's own: full rows of logits in, token ids out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dist_infer.config.sampling import SamplingParams
from dist_infer.sampling.parameters import check
from dist_infer.sampling.sampler import decide, resolve
from dist_infer.sampling.slots import Rows, SlotParams, SlotTable
from dist_infer.sampling.summary import SummaryLayout, summarize


def sample(
    logits: Tensor,
    params: SamplingParams | Sequence[SamplingParams],
    positions: Sequence[int],
    seeds: int | Sequence[int] | None = None,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    outputs: Sequence[Sequence[int]] | None = None,
    eos_ids: Sequence[int] = (),
) -> Tensor:
    """One token for each row, the same that the engine would choose.

    Args:
        logits: [rows, vocabulary], any floating type; left as they are.
        params: For all rows or for each. What concerns the course of a sequence (n, max_tokens, stop, logprobs) is the caller's.
        positions: How many tokens are before the one to choose, for each row.
        seeds: A seed for each row; or one for all, whose noise then differs from row to row; default: the seeds in `params`, in the
            same way.
        prompts: Token ids of each row's prompt; needed for penalties and min_tokens.
        outputs: Token ids each row has produced; likewise.
        eos_ids: End tokens, which may not come before min_tokens.

    Returns:
        Token ids [rows], int64, on the device of `logits`.

    Raises:
        ValueError: Arguments of the wrong length, no seed for a row that draws, tokens missing for penalties, or a row without a
            finite logit.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits of shape {list(logits.shape)}: give [rows, vocabulary]")
    rows, vocab = logits.shape
    each = [params] * rows if isinstance(params, SamplingParams) else list(params)
    seed_of = [p.seed for p in each] if seeds is None else [seeds] * rows if isinstance(seeds, int) else list(seeds)
    shared = isinstance(seeds, int) or (seeds is None and isinstance(params, SamplingParams))
    for name, given in (("params", each), ("positions", positions), ("seeds", seed_of), ("prompts", prompts), ("outputs", outputs)):
        if given is not None and len(given) != rows:
            raise ValueError(f"{name} for {len(given)} rows: there are {rows} rows of logits")
    table = SlotTable(rows, 0, vocab, logits.device)
    slots: list[SlotParams] = []
    for row, (p, seed) in enumerate(zip(each, seed_of, strict=True)):
        check(p, vocab)
        slot = replace(
            SlotParams.of(replace(p, logprobs=None), seed=seed or 0, eos_ids=eos_ids, vocab_size=vocab),
            seed=seed or 0,
            sequence=row if shared else 0,
            prompt_len=len(prompts[row]) if prompts is not None else 0,
        )
        if seed is None and not slot.greedy:
            raise ValueError(f"row {row} draws at temperature {slot.temperature} without a seed; give seeds, or sampling.seed")
        if (slot.needs_tokens or slot.min_tokens) and (prompts is None or outputs is None):
            raise ValueError(f"row {row} has penalties or min_tokens: give prompts and outputs")
        table.admit(row, slot, prompts[row] if prompts else (), outputs[row] if outputs else ())
        slots.append(slot)
    layout = SummaryLayout.for_rows(slots, has_targets=False)
    copy = logits.detach().to(torch.float32, copy=True).contiguous()
    summary, held = summarize(copy, layout, Rows(range(rows), positions), table)
    decisions = decide(layout, [summary.cpu()], slots, positions)
    if decisions.invalid:
        raise ValueError(f"logits of row {decisions.invalid[0]}: NaN, infinite, or every token banned; there is nothing to choose from")
    tokens = decisions.tokens
    for row, full in zip(decisions.unresolved, held.take(decisions.unresolved, vocab).cpu(), strict=True):
        tokens[row] = resolve(full[0], None, slots[row], positions[row]).token
    return torch.tensor(tokens, device=logits.device)

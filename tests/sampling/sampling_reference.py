"""The slow, obvious sampler that the fast one is held against: one row, one token at a time, plain Python where it can be."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dist_infer.model.weights import cut
from dist_infer.sampling.noise import gumbel, row_keys
from dist_infer.sampling.sampler import Decisions, decide, resolve
from dist_infer.sampling.slots import Rows, SlotParams, SlotTable
from dist_infer.sampling.summary import HeldRows, SummaryLayout, summarize


def reference_token(logits: Tensor, p: SlotParams, position: int, prompt: Sequence[int] = (), output: Sequence[int] = ()) -> int:
    """The token of one whole row of raw logits."""
    x = [np.float32(v) for v in logits.tolist()]
    inf = np.float32(math.inf)
    for t in range(len(x)):
        if t in set(prompt) | set(output):
            x[t] = x[t] / np.float32(p.repetition_penalty) if x[t] > 0 else x[t] * np.float32(p.repetition_penalty)
        x[t] = x[t] - np.float32(p.frequency_penalty) * np.float32(list(output).count(t))
        x[t] = x[t] - np.float32(p.presence_penalty) * np.float32(t in output)
    for t, bias in p.logit_bias:
        x[t] = x[t] + np.float32(bias)
    if position - p.prompt_len < p.min_tokens:
        for t in p.banned:
            x[t] = -inf
    order = sorted(range(len(x)), key=lambda t: (-x[t], t))
    if p.greedy:
        return order[0]
    x = [v / np.float32(p.temperature) for v in x]
    if p.top_k:
        order = order[: p.top_k]
    mass = [math.exp(float(x[t]) - float(x[order[0]])) for t in order]
    total = float(np.cumsum(mass)[-1])
    kept = []
    before = 0.0
    for t, m in zip(order, mass, strict=True):
        if p.top_p >= 1 or before < p.top_p * total:
            kept.append(t)
        before += m
    if p.min_p > 0:
        kept = [t for t in kept if float(x[t]) - float(x[order[0]]) >= math.log(p.min_p)]
    noise = gumbel(row_keys([p.seed], [p.sequence], [position]), torch.arange(len(x)))[0].tolist()
    return min(kept, key=lambda t: (-(x[t] + np.float32(noise[t])), t))


def summarize_sharded(
    logits: Tensor,
    params: Sequence[SlotParams],
    positions: Sequence[int],
    shards: int,
    prompts: Sequence[Sequence[int]] | None = None,
    outputs: Sequence[Sequence[int]] | None = None,
    targets: Sequence[int] | None = None,
) -> tuple[SummaryLayout, list[Tensor], list[HeldRows]]:
    """What `shards` ranks say of rows [R, V], and keep of them."""
    count, vocab = logits.shape
    layout = SummaryLayout.for_rows([SlotParams.unpack(p.pack()) for p in params], targets is not None)
    summaries, held = [], []
    for start, stop in (cut(vocab, shards, i) for i in range(shards)):
        table = SlotTable(count, start, stop - start, "cpu")
        for slot, p in enumerate(params):
            table.admit(slot, p, prompts[slot] if prompts else (), outputs[slot] if outputs else ())
        summary, rows = summarize(logits[:, start:stop].clone(), layout, Rows(range(count), positions, targets), table)
        assert summary.shape == (count, layout.width)
        summaries.append(summary)
        held.append(rows)
    return layout, summaries, held


def run_sharded(
    logits: Tensor,
    params: Sequence[SlotParams],
    positions: Sequence[int],
    shards: int,
    prompts: Sequence[Sequence[int]] | None = None,
    outputs: Sequence[Sequence[int]] | None = None,
    targets: Sequence[int] | None = None,
) -> tuple[list[int], Decisions]:
    """Tokens of rows [R, V] as `shards` ranks and a leader decide them, and the decisions before `resolve`."""
    layout, summaries, held = summarize_sharded(logits, params, positions, shards, prompts, outputs, targets)
    decisions = decide(layout, summaries, params, positions, targets)
    tokens = list(decisions.tokens)
    sizes = [rows.processed.shape[1] for rows in held]
    parts = [rows.take(decisions.unresolved, max(sizes))[:, :, :size] for rows, size in zip(held, sizes, strict=True)]
    full = torch.cat(parts, dim=2)
    for row, planes in zip(decisions.unresolved, full, strict=True):
        resolved = resolve(planes[0], planes[1] if layout.raw else None, params[row], positions[row])
        tokens[row] = resolved.token
        if layout.raw and params[row].logprobs >= 0:
            decisions.logprobs[row] = resolved.logprob
    return tokens, decisions

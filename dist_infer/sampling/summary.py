"""What a tp rank tells the leader about its slice of each row of logits.

A summary is a fixed number of float32 a row. Token ids travel as their bits, so summaries may be copied and
gathered, never added. Words: *raw* logits are the model's; *processed* ones have penalties, biases and bans;
*scaled* are processed ones divided by the temperature; *noised* are scaled ones plus Gumbel noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dist_infer.model.transfer import to_device
from dist_infer.sampling import compiled
from dist_infer.sampling.draws import BINS, draw, pick
from dist_infer.sampling.processors import changes, process
from dist_infer.sampling.ranking import best, log_sum, top
from dist_infer.sampling.slots import NO_LOGPROBS, Rows, SlotParams, SlotTable

SHORTLIST = 64  # up to this top_k the shards send the whole of it
NOISED = 64  # best noised tokens a shard sends where a filter may refuse many
ALL_REFUSED = 1e-6  # as likely may a filter by probability alone refuse all of them: then the row is resolved


@dataclass(frozen=True)
class SummaryLayout:
    """Which numbers a step's summaries hold; the same for all rows and ranks of a step.

    Attributes:
        shortlist: Best scaled tokens, for rows whose top_k is at most `SHORTLIST`.
        noised: Best noised tokens: 1 where rows keep all tokens, more where some row filters.
        logprobs: Best raw tokens; -1 when no row wants logprobs.
        targets: Whether some row is scored.
        masses: Whether the probability in each bin of logits is wanted (top_p).
        counts: Whether the number of tokens in each bin is (a top_k above `SHORTLIST`).
    """

    shortlist: int = 0
    noised: int = 0
    logprobs: int = NO_LOGPROBS
    targets: bool = False
    masses: bool = False
    counts: bool = False

    @classmethod
    def for_rows(cls, params: Iterable[SlotParams], has_targets: bool) -> SummaryLayout:
        """The layout that rows with these parameters need, in whatever order they come."""
        shortlist, noised, logprobs, masses, counts = 0, 0, NO_LOGPROBS, False, False
        for p in params:
            logprobs = max(logprobs, p.logprobs)
            if p.greedy:
                continue
            if shortlisted(p):
                shortlist = max(shortlist, p.top_k)
                continue
            noised = max(noised, _noised(p))
            masses = masses or p.top_p < 1
            counts = counts or p.top_k > 0
        return cls(shortlist, noised, logprobs, has_targets, masses, counts)

    @cached_property
    def fields(self) -> dict[str, slice]:
        """Where each field lies in a row."""
        fields: dict[str, slice] = {}
        start = 0
        for name, count in self._sizes():
            fields[name] = slice(start, start + count)
            start += count
        return fields

    @property
    def width(self) -> int:
        """float32 numbers a row."""
        return max(field.stop for field in self.fields.values())

    @property
    def settled(self) -> bool:
        """Whether each sampled row takes the greatest that any shard sends: a greedy row the best token, another the best noised one."""
        return not self.shortlist and self.noised <= 1

    @property
    def raw(self) -> bool:
        """Whether raw logits of chosen tokens are wanted."""
        return self.logprobs != NO_LOGPROBS

    def _sizes(self) -> Iterator[tuple[str, int]]:
        """Every field and how many numbers it has."""
        yield "best", 1  # processed
        yield "best_id", 1
        if self.raw:
            yield "best_raw", 1
        if self.raw or self.targets:
            yield "raw_max", 1
            yield "raw_sum", 1  # of exp(raw - raw_max)
        if self.targets:
            yield "target", 1  # raw; -inf in the shards that do not hold it
        if self.logprobs > 0:
            yield "top", self.logprobs  # raw, in order
            yield "top_id", self.logprobs
        for kind, count in (("short", self.shortlist), ("noised", self.noised)):
            if count:
                yield kind, count  # scaled, in order; noised, in any order
                yield f"{kind}_id", count
                if self.raw:
                    yield f"{kind}_raw", count
        if self.noised:
            yield "noised_scaled", self.noised
        if self.masses or self.counts:
            yield "top_bin", 1  # bin of the shard's best scaled logit
        if self.masses:
            yield "masses", BINS + 1  # sums of exp(scaled - shard's best), one bin after another downwards; all below them in the last
        if self.counts:
            yield "counts", BINS + 1


GREEDY = SummaryLayout()  # where every row takes the best


def _noised(params: SlotParams) -> int:
    """Best noised tokens that a drawn row needs: each is one that a filter by probability refuses with probability 1 - top_p."""
    if params.top_k > 0 or params.min_p > 0:
        return NOISED
    if params.top_p == 1:
        return 1
    needed = math.log(ALL_REFUSED) / math.log1p(-params.top_p)  # infinite for the least top_p
    return min(NOISED, 1 + math.ceil(min(NOISED, needed)))  # the last says only where knowledge ends


def shortlisted(params: SlotParams) -> bool:
    """Whether a drawn row's whole top_k travels in its summaries."""
    return 0 < params.top_k <= SHORTLIST


@dataclass(frozen=True)
class HeldRows:
    """The logits a rank keeps until the next step, for rows that the leader cannot decide from summaries.

    Attributes:
        processed: [R, vocab_local].
        raw: The same before processing; None where no row wants logprobs.
    """

    processed: Tensor
    raw: Tensor | None

    def take(self, rows: Sequence[int], width: int) -> Tensor:
        """The logits of `rows`, [len(rows), planes, width]: processed, then raw if there are; padded to `width` with -inf."""
        planes = [self.processed] if self.raw is None else [self.processed, self.raw]
        taken = torch.stack([plane[list(rows)] for plane in planes], dim=1)
        return torch.nn.functional.pad(taken, (0, width - taken.shape[2]), value=float("-inf"))


def summarize(logits: Tensor, layout: SummaryLayout, rows: Rows, table: SlotTable) -> tuple[Tensor, HeldRows]:
    """Summarize this rank's vocabulary slice of every row.

    Args:
        logits: Raw logits [R, vocab_local] float32, contiguous; overwritten with the processed ones.
        layout: The step's layout.
        rows: Whose rows they are.
        table: The sequences' parameters.

    Returns:
        The summaries [R, layout.width] float32, on the device of `logits`, and what to keep for `resolve`.
    """
    assert logits.dtype == torch.float32 and logits.shape == (len(rows), table.vocab_local), f"{logits.dtype} {tuple(logits.shape)}"
    params = [table[slot] for slot in rows.slots]
    if layout == GREEDY and logits.device.type == "cpu" and len(rows) and not changes(rows, params):
        found = compiled.greatest(logits, table.first_token)
        if found is not None:
            return found, HeldRows(logits, None)
    summary = _Summary(layout, len(rows), table.first_token, logits.device)
    if not len(rows):
        return summary.data, HeldRows(logits, logits if layout.raw else None)
    if layout.raw or layout.targets:
        _raw_fields(summary, logits, rows)
    raw = None
    if changes(rows, params):
        raw = logits.clone() if layout.raw else None
        process(logits, rows, params, table)
    elif layout.raw:
        raw = logits
    value, index = best(logits)
    summary.put("best", value)
    summary.put_ids("best_id", index)
    if raw is not None:
        summary.put("best_raw", raw.gather(1, index[:, None]))
    drawn = [r for r, p in enumerate(params) if rows.sampled(r) and not p.greedy]
    short = [r for r in drawn if shortlisted(params[r])]
    if short:
        _short_fields(summary, logits, raw, short, [params[r].temperature for r in short])
    rest = [r for r in drawn if not shortlisted(params[r])]
    if rest:
        _noised_fields(summary, logits, value, raw, rest, [params[r] for r in rest], [rows.positions[r] for r in rest])
    return summary.data, HeldRows(logits, raw)


class _Summary:
    """The summaries being written."""

    def __init__(self, layout: SummaryLayout, rows: int, first_token: int, device: torch.device) -> None:
        self.layout = layout
        self.first_token = first_token
        self.data = torch.zeros(rows, layout.width, device=device)

    def put(self, name: str, values: Tensor, rows: list[int] | None = None, missing: float = float("-inf")) -> None:
        """Write a field of `rows` (default: all) from `values` [n] or [n, up to the field's count]; the rest of it is `missing`."""
        values = values.to(torch.float32).view(values.shape[0], -1)
        field = self.layout.fields[name]
        absent = field.stop - field.start - values.shape[1]
        if absent:
            values = torch.nn.functional.pad(values, (0, absent), value=missing)
        if rows is None or len(rows) == self.data.shape[0]:
            self.data[:, field] = values
        else:
            self.data[to_device(rows, self.data.device), field] = values

    def put_ids(self, name: str, index: Tensor, rows: list[int] | None = None) -> None:
        """Write the bits of token ids, given as indices into the slice; an absent one is an id of 0."""
        self.put(name, (index + self.first_token).to(torch.int32).view(torch.float32), rows, missing=0.0)


def _raw_fields(summary: _Summary, logits: Tensor, rows: Rows) -> None:
    """Maximum and sum for the raw log-normalizer, target logits, best raw tokens."""
    layout = summary.layout
    greatest, total = log_sum(logits)
    summary.put("raw_max", greatest)
    summary.put("raw_sum", total)
    if rows.targets is not None and layout.targets:
        index = to_device(rows.targets, logits.device)[:, None] - summary.first_token
        own = (index >= 0) & (index < logits.shape[1])
        found = logits.gather(1, index.clamp(0, logits.shape[1] - 1))
        summary.put("target", torch.where(own, found, float("-inf")))
    if layout.logprobs > 0:
        values, index = top(logits, min(layout.logprobs, logits.shape[1]))
        summary.put("top", values)
        summary.put_ids("top_id", index)


def _short_fields(summary: _Summary, logits: Tensor, raw: Tensor | None, rows: list[int], temperatures: list[float]) -> None:
    """The best tokens of rows with a small top_k."""
    scaled = pick(logits, rows) / to_device(temperatures, logits.device, torch.float32)[:, None]
    values, index = top(scaled, min(summary.layout.shortlist, scaled.shape[1]))
    summary.put("short", values, rows)
    summary.put_ids("short_id", index, rows)
    if raw is not None:
        summary.put("short_raw", pick(raw, rows).gather(1, index), rows)


def _noised_fields(
    summary: _Summary, logits: Tensor, greatest: Tensor, raw: Tensor | None, rows: list[int], params: list[SlotParams], positions: list[int]
) -> None:
    """The best noised tokens of rows that keep more than a shortlist, and their histograms where they filter."""
    layout = summary.layout
    drawn = draw(logits, greatest, rows, params, positions, summary.first_token, min(layout.noised, logits.shape[1]))
    summary.put("noised", drawn.noised, rows)
    summary.put_ids("noised_id", drawn.index, rows)
    summary.put("noised_scaled", drawn.scaled, rows)
    if raw is not None:
        summary.put("noised_raw", pick(raw, rows).gather(1, drawn.index), rows)
    histograms = drawn.histograms
    if histograms is not None:
        summary.put("top_bin", histograms.top_bin.to(torch.int32).view(torch.float32), histograms.rows)
        if layout.masses:
            summary.put("masses", histograms.masses, histograms.rows)
        if layout.counts:
            summary.put("counts", histograms.counts, histograms.rows)

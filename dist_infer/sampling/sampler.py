"""The leader's decision, from the summaries of all vocabulary slices.

A row that is drawn divides its processed logits by the temperature; keeps the `top_k` best; of these, the best
while the probability before them (of what top_k kept) is below `top_p`; of these, the ones at least `min_p` times as likely as the
best; and takes the one whose logit plus Gumbel noise is greatest. Equal logits are ordered by id, lowest first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_infer.sampling.draws import BINS, BINS_PER_NAT
from dist_infer.sampling.noise import gumbel, row_keys
from dist_infer.sampling.ranking import in_order
from dist_infer.sampling.slots import SlotParams
from dist_infer.sampling.summary import GREEDY, SummaryLayout, shortlisted

MARGIN = 1e-5  # relative; summed probabilities are known to about 1e-6


@dataclass(frozen=True)
class Decisions:
    """What was decided for each row of a step.

    Attributes:
        tokens: Token ids; -1 for rows that were scored, or are in `unresolved` or `invalid`.
        logprobs: Raw logprob of the token, or of a scored row's target; None where not wanted or not yet known.
        top_logprobs: As many best (token id, raw logprob) as the row wants, best first.
        is_greedy: For a scored row, whether the target is the best token.
        unresolved: Rows whose token `resolve` must find from their full logits.
        invalid: Rows with NaN or infinite logits, or with every token banned.
    """

    tokens: list[int]
    logprobs: list[float | None]
    top_logprobs: list[list[tuple[int, float]]]
    is_greedy: list[bool]
    unresolved: list[int]
    invalid: list[int]


@dataclass(frozen=True)
class Resolved:
    """A token decided from a full row, and its raw logprob if that was wanted."""

    token: int
    logprob: float | None


class _Summaries:
    """The summaries of all shards, field by field as [rows, shards, count]."""

    def __init__(self, layout: SummaryLayout, shards: Sequence[Tensor]) -> None:
        self._fields = layout.fields
        self._data = np.stack([shard.numpy() for shard in shards], axis=1)

    def values(self, name: str, rows: Sequence[int] | slice = slice(None)) -> np.ndarray:
        """The float32 numbers of a field."""
        return self._data[rows, :, self._fields[name]]

    def ids(self, name: str, rows: Sequence[int] | slice = slice(None)) -> np.ndarray:
        """The integers of a field."""
        return np.ascontiguousarray(self._data[rows, :, self._fields[name]]).view(np.int32).astype(np.int64)

    def flat(self, name: str, rows: Sequence[int]) -> np.ndarray:
        """The float32 numbers of a field, [rows, shards x count]."""
        return self.values(name, rows).reshape(len(rows), -1)

    def flat_ids(self, name: str, rows: Sequence[int]) -> np.ndarray:
        """The integers of a field, [rows, shards x count]."""
        return self.ids(name, rows).reshape(len(rows), -1)


def decide(
    layout: SummaryLayout,
    summaries: Sequence[Tensor],
    params: Sequence[SlotParams],
    positions: Sequence[int],
    targets: Sequence[int] | None = None,
) -> Decisions:
    """Decide every row that its summaries can decide.

    Args:
        layout: The step's layout.
        summaries: One [R, layout.width] CPU tensor for each tp rank, in rank order.
        params: Parameters of each row's sequence.
        positions: Position of the token that each row decides or scores.
        targets: As in `Rows`.
    """
    count = len(params)
    if layout == GREEDY:
        return _decide_greedy(summaries, count)
    data = _Summaries(layout, summaries)
    shard_best = data.values("best")[:, :, 0]
    shard = shard_best.argmax(axis=1)  # ranks hold ascending ids, so the first of equals has the lowest
    everyone = np.arange(count)
    best_value, best_id = shard_best[everyone, shard], data.ids("best_id")[everyone, shard, 0]
    finite = np.isfinite(best_value)

    tokens = np.full(count, -1, np.int64)
    raw = np.full(count, np.nan)  # raw logit of the token or target
    scored = np.zeros(count, bool) if targets is None else np.array(targets, np.int64) >= 0
    is_greedy = np.zeros(count, bool)
    if targets is not None and layout.targets:
        is_greedy = scored & (best_id == np.array(targets))
        raw = np.where(scored, data.values("target")[:, :, 0].max(axis=1), raw)
    greedy = np.array([p.greedy for p in params], bool) & ~scored & finite
    tokens[greedy] = best_id[greedy]
    if layout.raw:
        raw = np.where(greedy, data.values("best_raw")[everyone, shard, 0], raw)
    drawn = [int(r) for r in np.flatnonzero(finite & ~scored & ~greedy)]
    short = [r for r in drawn if shortlisted(params[r])]
    if short:
        tokens[short], raw[short] = _decide_short(data, layout, short, params, positions)
    rest = [r for r in drawn if not shortlisted(params[r])]
    if rest:
        tokens[rest], raw[rest] = _decide_noised(data, layout, rest, params, best_value[rest], best_id[rest])
    decided = scored | (tokens >= 0)

    logprobs: list[float | None] = [None] * count
    top_logprobs: list[list[tuple[int, float]]] = [[] for _ in params]
    if layout.raw or layout.targets:
        with np.errstate(invalid="ignore", divide="ignore"):  # invalid rows give NaN, which nobody reads
            normalizer = _log_normalizer(data)
            known = raw - normalizer
            if layout.logprobs > 0:
                top_logprobs = _top_logprobs(data, params, normalizer)
        wanted = decided & finite & (scored | np.array([p.logprobs >= 0 for p in params], bool))
        logprobs = [value if want else None for value, want in zip(known.tolist(), wanted.tolist(), strict=True)]
    return Decisions(
        tokens=tokens.tolist(),
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        is_greedy=is_greedy.tolist(),
        unresolved=np.flatnonzero(finite & ~decided).tolist(),
        invalid=np.flatnonzero(~finite).tolist(),
    )


def _decide_greedy(summaries: Sequence[Tensor], count: int) -> Decisions:
    """`decide` where every row takes the best: most steps of most runs, between which the processor waits."""
    found = summaries[0].numpy()
    if len(summaries) > 1:
        shards = np.stack([shard.numpy() for shard in summaries], axis=1)
        found = shards[np.arange(count), shards[:, :, 0].argmax(axis=1)]  # ranks hold ascending ids, so the first of equals has the lowest
    finite = np.isfinite(found[:, 0])
    tokens = np.where(finite, found[:, 1].view(np.int32), -1).tolist()
    invalid = [] if finite.all() else np.flatnonzero(~finite).tolist()
    return Decisions(tokens, [None] * count, [[] for _ in tokens], [False] * count, [], invalid)


def resolve(processed: Tensor, raw: Tensor | None, params: SlotParams, position: int) -> Resolved:
    """Decide a drawn row from its full logits.

    Args:
        processed: Processed logits of the whole vocabulary, [V] float32 on the CPU.
        raw: The raw ones; needed for a logprob.
        params: Parameters of the row's sequence.
        position: Position of the token to decide.
    """
    scaled = processed.numpy() / np.float32(params.temperature)
    order = in_order(torch.from_numpy(scaled)).numpy()
    if params.top_k > 0:
        order = order[: params.top_k]
    keep = _kept(scaled[None, order], [params])[0]
    ids = order[keep]
    noised = scaled[ids] + _noise([params], [position], ids)[0]
    token = int(ids[noised == noised.max()].min())
    if raw is None:
        return Resolved(token, None)
    logits = raw.double()
    return Resolved(token, float(logits[token] - logits.logsumexp(0)))


def _noise(params: Sequence[SlotParams], positions: Sequence[int], ids: np.ndarray) -> np.ndarray:
    """Noise of `ids` ([n], or [rows, n]) in each row."""
    keys = row_keys([p.seed for p in params], [p.sequence for p in params], positions)
    return gumbel(keys, torch.from_numpy(np.ascontiguousarray(ids))).numpy()


def _kept(scaled: np.ndarray, params: Sequence[SlotParams]) -> np.ndarray:
    """Which of each row's tokens top_p and min_p keep; the rows [rows, n] are in order and hold what top_k kept."""
    values = scaled.astype(np.float64)
    masses = np.exp(values - values[:, :1])
    until = masses.cumsum(axis=1)
    before = np.concatenate([np.zeros((len(values), 1)), until[:, :-1]], axis=1)
    top_p = np.array([p.top_p for p in params])[:, None]
    keep = (top_p >= 1) | (before < top_p * until[:, -1:])
    return keep & (values - values[:, :1] >= _least(params))


def _least(params: Sequence[SlotParams]) -> np.ndarray:
    """Least scaled logit that min_p keeps, relative to the row's best, [rows, 1]."""
    return np.array([math.log(p.min_p) if p.min_p > 0 else -math.inf for p in params])[:, None]


def _decide_short(
    data: _Summaries, layout: SummaryLayout, rows: list[int], params: Sequence[SlotParams], positions: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and raw logits of rows whose whole top_k is in the summaries."""
    own = [params[r] for r in rows]
    values, ids = data.flat("short", rows), data.flat_ids("short_id", rows)
    order = np.lexsort((ids, -values), axis=-1)[:, : layout.shortlist]
    values, ids = np.take_along_axis(values, order, 1), np.take_along_axis(ids, order, 1)
    rank = np.arange(values.shape[1])
    values = np.where(rank < np.array([p.top_k for p in own])[:, None], values, np.float32(-np.inf))
    noised = values + _noise(own, [positions[r] for r in rows], ids)
    noised = np.where(_kept(values, own), noised, -np.inf)
    equals = noised == noised.max(axis=1, keepdims=True)
    chosen = np.where(equals, ids, np.iinfo(np.int64).max).argmin(axis=1)[:, None]
    tokens = np.take_along_axis(ids, chosen, 1)[:, 0]
    if not layout.raw:
        return tokens, np.full(len(rows), np.nan)
    raw = np.take_along_axis(data.flat("short_raw", rows), np.take_along_axis(order, chosen, 1), 1)
    return tokens, raw[:, 0]


def _decide_noised(
    data: _Summaries, layout: SummaryLayout, rows: list[int], params: Sequence[SlotParams], best_value: np.ndarray, best_id: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (-1 where undecided) and raw logits: the best noised token that the filter surely keeps, if those before it are surely out."""
    own = [params[r] for r in rows]
    noised, ids = data.flat("noised", rows), data.flat_ids("noised_id", rows)
    order = np.lexsort((ids, -noised), axis=-1)
    noised, ids = np.take_along_axis(noised, order, 1), np.take_along_axis(ids, order, 1)
    scaled = np.take_along_axis(data.flat("noised_scaled", rows), order, 1)
    best = best_value / np.array([p.temperature for p in own], np.float32)
    surely_in, surely_out = _judge(data, layout, rows, own, scaled, best)
    is_best = ids == best_id[:, None]  # every filter keeps the best token
    surely_in |= is_best
    surely_out &= ~is_best
    if layout.noised > 1:
        # A shard knows nothing of tokens below the last it sent, nor of those equal to it.
        last = data.values("noised", rows).min(axis=2).max(axis=1)
        surely_in &= noised > last[:, None]
    first = (~surely_out).argmax(axis=1)[:, None]
    decided = np.take_along_axis(surely_in & ~surely_out, first, 1)[:, 0]
    tokens = np.where(decided, np.take_along_axis(ids, first, 1)[:, 0], -1)
    if not layout.raw:
        return tokens, np.full(len(rows), np.nan)
    raw = np.take_along_axis(data.flat("noised_raw", rows), np.take_along_axis(order, first, 1), 1)
    return tokens, raw[:, 0]


def _judge(
    data: _Summaries, layout: SummaryLayout, rows: list[int], params: Sequence[SlotParams], scaled: np.ndarray, best: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which candidates `scaled` [rows, n] the filters surely keep, and which they surely refuse.

    A candidate's rank and the probability before it lie between what the bins above its own hold and what its own adds.
    """
    relative = scaled.astype(np.float64) - best.astype(np.float64)[:, None]
    surely_out = relative < _least(params)
    surely_in = ~surely_out
    if not (layout.masses or layout.counts):
        return surely_in, surely_out
    tops = data.ids("top_bin", rows)[:, :, 0]
    shifts = tops.max(axis=1, keepdims=True) - tops
    bin_ = np.floor(scaled * np.float32(BINS_PER_NAT)).clip(-(2.0**30), 2.0**30).astype(np.int64)
    bin_ = (tops.max(axis=1, keepdims=True) - bin_).clip(0, BINS)
    counts = masses = np.zeros((len(rows), BINS + 1))
    top_k = np.array([p.top_k or math.inf for p in params])[:, None]
    if layout.counts:
        counts = _aligned(data.values("counts", rows), shifts).cumsum(axis=1)
        before, through = _around(counts, bin_)
        surely_in &= through <= top_k
        surely_out |= before >= top_k
    if layout.masses:
        shard_best = data.values("best", rows)[:, :, 0] / np.array([p.temperature for p in params], np.float32)[:, None]
        weight = np.exp(shard_best.astype(np.float64) - best.astype(np.float64)[:, None])
        masses = _aligned(data.values("masses", rows) * weight[:, :, None], shifts).cumsum(axis=1)
        # What top_k keeps: all bins it keeps whole, and at most one more.
        whole = (counts <= top_k).sum(axis=1, keepdims=True)
        kept_low, kept_high = _around(masses, whole)
        before, through = _around(masses, bin_)
        slack = MARGIN * through
        top_p = np.array([p.top_p for p in params])[:, None]
        surely_in &= (top_p >= 1) | (through - np.exp(relative) + slack < top_p * kept_low)
        surely_out |= (top_p < 1) & (before - slack >= top_p * kept_high)
    return surely_in, surely_out


def _aligned(histograms: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """The sum [rows, BINS + 1] of the shards' histograms [rows, shards, BINS + 1], each begun `shifts` [rows, shards] bins lower."""
    rows = len(histograms)
    bins = (np.arange(BINS + 1) + shifts[:, :, None]).clip(0, BINS) + np.arange(0, rows * (BINS + 1), BINS + 1)[:, None, None]
    return np.bincount(bins.ravel(), histograms.ravel(), minlength=rows * (BINS + 1)).reshape(rows, BINS + 1)


def _around(until: np.ndarray, bins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the bins before each of `bins` hold, and what they hold together with it; `until` are cumulative sums [rows, BINS + 1]."""
    padded = np.pad(until, ((0, 0), (1, 1)))
    padded[:, -1] = until[:, -1]  # past the last bin there is no more
    return np.take_along_axis(padded, bins, 1), np.take_along_axis(padded, bins + 1, 1)


def _log_normalizer(data: _Summaries) -> np.ndarray:
    """Log of the sum of exp(raw logit) of each row."""
    maxima = data.values("raw_max")[:, :, 0].astype(np.float64)
    greatest = maxima.max(axis=1)
    return greatest + np.log((data.values("raw_sum")[:, :, 0] * np.exp(maxima - greatest[:, None])).sum(axis=1))


def _top_logprobs(data: _Summaries, params: Sequence[SlotParams], normalizer: np.ndarray) -> list[list[tuple[int, float]]]:
    """The best raw tokens of each row that wants them."""
    everyone = list(range(len(params)))
    values, ids = data.flat("top", everyone), data.flat_ids("top_id", everyone)
    order = np.lexsort((ids, -values), axis=-1)
    values, ids = np.take_along_axis(values, order, 1) - normalizer[:, None], np.take_along_axis(ids, order, 1)
    wanted = [slice(max(p.logprobs, 0)) for p in params]
    # -inf: a vocabulary of fewer tokens than wanted.
    return [
        [(i, v) for i, v in zip(ids[r, some].tolist(), values[r, some].tolist(), strict=True) if v > -math.inf]
        for r, some in enumerate(wanted)
    ]

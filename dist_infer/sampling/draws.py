"""What a shard finds out for rows that are drawn from more than a shortlist: the best noised tokens, and where probability lies.

Words are those of `summary`. Noise is added to every token, but only the best are seen; compiled code computes it only where it may make a
token one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_infer.model.transfer import to_device
from dist_infer.sampling import compiled
from dist_infer.sampling.noise import noised, row_keys
from dist_infer.sampling.ranking import best, top
from dist_infer.sampling.slots import SlotParams

BINS = 512  # bins of a histogram, downwards from the shard's best
BINS_PER_NAT = 32


@dataclass(frozen=True)
class Histograms:
    """How some rows' scaled logits lie, in bins from the shard's best downwards; all below them in the last.

    Attributes:
        rows: Which rows.
        top_bin: [rows] int64, bin of the best.
        masses: [rows, BINS + 1] float64, sums of exp(scaled - best): a bin of many tokens is known far better than the leader's margin.
        counts: [rows, BINS + 1] float64, numbers of tokens; zeros where they are not wanted.
    """

    rows: list[int]
    top_bin: Tensor
    masses: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Draws:
    """The first tokens of rows, the greater noised value first.

    Attributes:
        noised: [rows, few] float32.
        index: [rows, few] int64, in the slice.
        scaled: [rows, few] float32, their logits divided by the temperature.
        histograms: Of rows that filter by probability or by a large number; None if there are none.
    """

    noised: Tensor
    index: Tensor
    scaled: Tensor
    histograms: Histograms | None


def draw(
    logits: Tensor, greatest: Tensor, rows: list[int], params: Sequence[SlotParams], positions: Sequence[int], first_token: int, few: int
) -> Draws:
    """Draw from a slice of the vocabulary.

    Args:
        logits: Processed logits [R, vocab_local] float32, contiguous.
        greatest: [R], of each row.
        rows: Which of them, ascending.
        params: Parameters of these.
        positions: Positions of the tokens they decide.
        first_token: Id of the slice's first token.
        few: How many tokens are wanted, at most vocab_local.
    """
    keys = row_keys([p.seed for p in params], [p.sequence for p in params], positions)
    temperature = to_device([p.temperature for p in params], logits.device, torch.float32)
    greatest = (pick(greatest, rows) / temperature).clamp_min(torch.finfo(torch.float32).min)  # finite even where a slice is all -inf
    binned = [i for i, p in enumerate(params) if p.top_p < 1 or p.top_k > 0]
    with_counts = any(p.top_k > 0 for p in params)
    masses, counts = torch.zeros(2, len(binned), BINS + 1, dtype=torch.float64, device=logits.device)
    found = None
    if logits.device.type == "cpu":
        mass_of = dict(zip(binned, masses, strict=True))
        count_of = dict(zip(binned, counts, strict=True)) if with_counts else {}
        found = compiled.draw(
            logits, rows, temperature, greatest, torch.from_numpy(keys), first_token, few, mass_of, count_of, BINS_PER_NAT
        )
    if found is None:
        # A tensor of divisors: dividing by a number may become multiplying by its inverse, which rounds otherwise.
        scaled = pick(logits, rows) / temperature[:, None]
        found = _first_noised(scaled, keys, first_token, few)
        if binned:
            _add_histograms(pick(scaled, binned), pick(greatest, binned)[:, None], masses, counts if with_counts else None)
    histograms = Histograms([rows[i] for i in binned], _bin_of(pick(greatest, binned)), masses, counts) if binned else None
    return Draws(*found, histograms)


def pick(values: Tensor, rows: list[int]) -> Tensor:
    """The given rows (ascending) of `values`; `values` itself when they are all of them."""
    if len(rows) == values.shape[0]:
        return values
    return values[to_device(rows, values.device)]


def _first_noised(scaled: Tensor, keys: np.ndarray, first_token: int, few: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noised values, index and scaled logits of the first `few` tokens of each row, [rows, few]."""
    total = noised(scaled, keys, first_token)
    if few > 1:
        values, index = top(total, few)
    else:
        values, index = (of[:, None] for of in best(total))
    return values, index, scaled.gather(1, index)


def _add_histograms(scaled: Tensor, greatest: Tensor, masses: Tensor, counts: Tensor | None) -> None:
    """Add those of `scaled` [rows, vocab_local], whose `greatest` are [rows, 1], to `masses` and `counts`."""
    bins = (_bin_of(greatest) - _bin_of(scaled)).clamp_(0, BINS)
    masses.scatter_add_(1, bins, (scaled - greatest).exp_().double())
    if counts is not None:
        counts.scatter_add_(1, bins, torch.ones((), dtype=torch.float64, device=scaled.device).expand_as(bins))


def _bin_of(scaled: Tensor) -> Tensor:
    """Bin of each scaled logit on the grid that all shards share, int64; a greater logit's is no lower."""
    return (scaled * BINS_PER_NAT).floor().clamp(-(2.0**30), 2.0**30).long()

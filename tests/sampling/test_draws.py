"""The best noised tokens of a slice and its histograms: compiled and eager, and of what lies where."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dist_infer.model import native
from dist_infer.sampling import compiled as compiled_functions
from dist_infer.sampling.draws import BINS, BINS_PER_NAT, Draws, draw
from dist_infer.sampling.noise import gumbel, row_keys
from dist_infer.sampling.slots import SlotParams

needs_compiler = pytest.mark.skipif(native.kernels(torch.float32) is None, reason="no C++ compiler")
FIRST = 70
PARAMS = [
    SlotParams(temperature=1.0, seed=1, top_p=0.9),
    SlotParams(temperature=0.7, seed=2),
    SlotParams(temperature=3.0, seed=3, sequence=1, top_k=200),
    SlotParams(temperature=1e-3, seed=4, top_p=0.5, top_k=100),
    SlotParams(temperature=1.0, seed=2**63 - 1, top_p=0.3),
    SlotParams(temperature=1.5, seed=6, min_p=0.1),
]


def logits(kind: str, vocab: int) -> Tensor:
    x = torch.randn(8, vocab, generator=torch.Generator().manual_seed(vocab))
    if kind == "wide":
        x *= torch.tensor([1.0, 8.0, 300.0, 0.1, 1.0, 5.0, 1e6, 1.0])[:, None]
    elif kind == "rising":
        x = x.sort(dim=1).values * 20  # each token is the best so far
    elif kind == "few":
        x[:, ::2], x[3], x[5, 1:] = float("-inf"), float("-inf"), float("-inf")
    return x


def drawn(x: Tensor, few: int, rows: list[int] | None = None) -> Draws:
    rows = [0, 1, 3, 5, 6, 7] if rows is None else rows
    return draw(x, x.amax(dim=1), rows, PARAMS[: len(rows)], range(10, 10 + len(rows)), FIRST, few)


@needs_compiler
@pytest.mark.parametrize("kind", ["plain", "wide", "rising", "few"])
@pytest.mark.parametrize(("vocab", "few"), [(2003, 1), (2003, 64), (515, 20), (33, 33), (40_000, 7)])
def test_compiled_draws_are_the_eager_ones(kind: str, vocab: int, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = logits(kind, vocab)
    compiled = drawn(x, few)
    monkeypatch.setattr(compiled_functions, "draw", lambda *_: None)
    eager = drawn(x, few)
    assert compiled.index.equal(eager.index) and compiled.scaled.equal(eager.scaled)
    torch.testing.assert_close(compiled.noised, eager.noised, rtol=1e-6, atol=1e-5)
    found, expected = compiled.histograms, eager.histograms
    assert found is not None and expected is not None
    assert found.rows == expected.rows == [0, 3, 5, 6]
    assert found.top_bin.equal(expected.top_bin)
    assert found.counts.equal(expected.counts) and found.counts.sum(dim=1).tolist() == [vocab] * 4
    torch.testing.assert_close(found.masses, expected.masses, rtol=1e-6, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("few", [1, 64])
def test_noise_left_out_would_not_have_been_seen(few: int) -> None:
    rows, vocab = 600, 3000
    params = [SlotParams(temperature=1.0 + i % 2, seed=i) for i in range(rows)]
    x = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(5))
    found = draw(x, x.amax(dim=1), list(range(rows)), params, range(rows), FIRST, few)
    keys = row_keys([p.seed for p in params], [p.sequence for p in params], range(rows))
    total = x / torch.tensor([p.temperature for p in params])[:, None] + gumbel(keys, torch.arange(FIRST, FIRST + vocab))
    assert found.noised.equal(total.topk(few, dim=1).values), "to the last bit: the leader computes this noise again"
    assert found.noised.equal(total.gather(1, found.index))


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
def test_a_histogram_says_what_lies_above(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(compiled_functions, "draw", lambda *_: None)
    x = logits("plain", 3001) * 4
    histograms = drawn(x, 1).histograms
    assert histograms is not None
    scaled = x[0].double() - x[0].max()
    bins = int(histograms.top_bin[0]) - (x[0] * BINS_PER_NAT).floor().long()
    for last in (0, 10, 100, BINS - 1):
        assert histograms.counts[0, : last + 1].sum() == (bins <= last).sum()
        torch.testing.assert_close(histograms.masses[0, : last + 1].sum(), scaled[bins <= last].exp().sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
def test_counts_are_not_made_where_nobody_asks(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(compiled_functions, "draw", lambda *_: None)
    x = logits("plain", 500)
    without = drawn(x, 4, [0, 1]).histograms
    assert without is not None and without.rows == [0]
    assert not without.counts.any() and without.masses.any()
    only = draw(x, x.amax(dim=1), [2], [SlotParams(temperature=1.0)], [0], 0, 1)
    assert only.histograms is None


@needs_compiler
def test_not_a_number_is_no_trouble() -> None:  # such a row is refused by its best
    x = logits("plain", 700)
    x[0, 7], x[3] = float("nan"), float("nan")
    found = drawn(x, 64)
    assert found.index[2].tolist() == [0] * 64 and found.noised[2].isinf().all()
    assert 7 not in found.index[0]

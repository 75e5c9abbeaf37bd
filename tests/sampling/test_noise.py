"""Noise must be pure, and noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sampling_reference import run_sharded
from scipy import stats

from dist_infer.model import native
from dist_infer.sampling import compiled as compiled_functions
from dist_infer.sampling.noise import gumbel, noised, row_keys
from dist_infer.sampling.slots import SlotParams


def uniform(keys: np.ndarray, ids: torch.Tensor) -> np.ndarray:
    return np.exp(-np.exp(-gumbel(keys, ids).double().numpy()))


def test_a_slice_has_the_noise_of_the_whole() -> None:
    keys = row_keys([2**63 - 1, 5, 5], [0, 0, 1], [100, 7, 7])
    whole = gumbel(keys, torch.arange(32003))
    for start, stop in ((0, 1), (1, 3), (8001, 16002), (31999, 32003), (0, 32003)):
        assert torch.equal(gumbel(keys, torch.arange(start, stop)), whole[:, start:stop])
        assert torch.equal(gumbel(keys[1:2], torch.arange(start, stop)), whole[1:2, start:stop])
    ids = torch.tensor([[5, 1, 32002], [0, 0, 7], [9, 8, 1]])
    assert torch.equal(gumbel(keys, ids), whole.gather(1, ids))


def test_known_values_do_not_change() -> None:
    """Seeds in people's records must keep their meaning."""
    noise = gumbel(row_keys([1234567890123456789], [2], [77]), torch.tensor([0, 1, 31999]))
    assert noise[0].tolist() == pytest.approx([-0.17697370052337646, -1.0326175689697266, 3.097860336303711], rel=1e-6)


@pytest.mark.parametrize("axis", ["token", "position", "sequence", "seed"])
def test_noise_is_gumbel_along_every_axis(axis: str) -> None:
    n = 200_000
    if axis == "token":
        u = uniform(row_keys([3], [0], [9]), torch.arange(n))[0]
    else:
        count, zero = range(n), [4] * n
        u = uniform(row_keys(*(count if axis == a else zero for a in ("seed", "sequence", "position"))), torch.tensor([17]))[:, 0]
    counts = np.histogram(u, bins=256, range=(0, 1))[0]
    assert stats.chisquare(counts).pvalue > 1e-4
    tail = -np.log(-np.log(u))  # back to Gumbel; its upper tail decides
    assert stats.kstest(tail[tail > 5] - 5, "expon").pvalue > 1e-4
    neighbours = np.histogram2d(u[:-1], u[1:], bins=16, range=((0, 1), (0, 1)))[0]
    assert stats.chisquare(neighbours.ravel()).pvalue > 1e-4


def test_rows_of_noise_are_independent() -> None:
    """Neighbouring seeds, sequences and positions, and swapped ones, share nothing."""
    numbers = [(s, q, p) for s in range(4) for q in range(4) for p in range(4)]
    u = uniform(row_keys(*zip(*numbers, strict=True)), torch.arange(20_000))
    correlation = np.corrcoef(u)
    off = correlation[~np.eye(len(u), dtype=bool)]
    assert np.abs(off).max() < 5 / math.sqrt(20_000)
    assert len(np.unique(u.max(axis=1))) == len(u)


def test_the_tail_is_fine() -> None:
    noise = gumbel(row_keys([1], [0], [0]), torch.arange(4_000_000))[0]
    assert torch.isfinite(noise).all()
    above = noise[noise > 10]
    assert len(above) == pytest.approx(4_000_000 * math.exp(-10), rel=0.3)
    assert len(above.unique()) == len(above)


@pytest.mark.parametrize("features", [{}, {"top_k": 12}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 80, "top_p": 0.95}])
def test_tokens_follow_the_distribution(features: dict[str, float]) -> None:
    vocab, rows = 90, 6000
    torch.manual_seed(0)
    row = torch.randn(vocab)
    params = [SlotParams(seed=99, temperature=0.8, **features)] * rows
    tokens = np.array(run_sharded(row.expand(rows, vocab), params, range(rows), 2)[0])
    p = (row.double() / 0.8).softmax(0)
    order = p.argsort(descending=True)
    keep = torch.zeros(vocab, dtype=torch.bool)
    keep[order[: int(features.get("top_k", vocab))]] = True
    q = torch.where(keep, p, 0) / p[keep].sum()
    before = q[order].cumsum(0) - q[order]
    keep[order] &= before < features.get("top_p", 1.0)
    keep &= p >= features.get("min_p", 0.0) * p.max()
    expected = (torch.where(keep, p, 0) / p[keep].sum()).numpy() * rows
    observed = np.bincount(tokens, minlength=vocab)
    assert observed[expected == 0].sum() == 0
    common = expected >= 5
    pooled = [*observed[common], observed[~common].sum()], [*expected[common], expected[~common].sum()]
    some = [i for i in range(len(pooled[1])) if pooled[1][i] > 0]
    assert stats.chisquare([pooled[0][i] for i in some], [pooled[1][i] for i in some]).pvalue > 1e-4


@pytest.mark.skipif(native.kernels(torch.float32) is None, reason="no C++ compiler")
def test_compiled_noise_is_the_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = row_keys([2**63 - 1, 5, 0], [0, 0, 1], [100, 7, 7])
    for ids in (torch.arange(32003), torch.arange(9000).view(3, -1) * 7, torch.tensor([5])):
        compiled = gumbel(keys, ids)
        with monkeypatch.context() as patch:
            patch.setattr(compiled_functions, "gumbel", lambda *_: None)
            torch.testing.assert_close(compiled, gumbel(keys, ids), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("compiled", [True, False])
def test_noise_is_added_to_logits(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(compiled_functions, "gumbel", lambda *_: None)
    keys, scaled = row_keys([7, 8], [0, 0], [3, 4]), torch.randn(2, 1003, generator=torch.Generator().manual_seed(1))
    expected = scaled + gumbel(keys, torch.arange(50, 1053))
    torch.testing.assert_close(noised(scaled.clone(), keys, 50), expected, rtol=1e-6, atol=1e-6)

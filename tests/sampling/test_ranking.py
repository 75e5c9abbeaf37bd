"""The compiled ranking of tokens is the eager one."""

from __future__ import annotations

import pytest
import torch

from dist_infer.model import native
from dist_infer.sampling import compiled as compiled_functions
from dist_infer.sampling.ranking import best, log_sum, top

INF, NAN = float("inf"), float("nan")


@pytest.mark.skipif(native.kernels(torch.float32) is None, reason="no C++ compiler")
@pytest.mark.parametrize("size", [1, 15, 16, 1003])
def test_compiled_ranking_is_the_eager_one(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(8, size, generator=torch.Generator().manual_seed(size))
    values[1] = values[1].round()  # many equals
    values[2], values[3, size // 2], values[4, size // 2] = -INF, NAN, INF
    values[5, : size // 2] = -INF
    values[6] = -3.0
    found, sums = best(values), log_sum(values)
    monkeypatch.setattr(compiled_functions, "best", lambda *_, **__: None)
    eager, eager_sums = best(values), log_sum(values)
    finite = torch.tensor([0, 1, 2, 5, 6, 7])
    torch.testing.assert_close(found[0], eager[0], rtol=0, atol=0, equal_nan=True)
    assert found[1][finite].equal(eager[1][finite]), "among equals the lowest id comes first"
    torch.testing.assert_close(sums[0], eager_sums[0], rtol=0, atol=0, equal_nan=True)
    known = torch.tensor([0, 1, 5, 6, 7])
    torch.testing.assert_close(sums[1][known], eager_sums[1][known], rtol=1e-6, atol=0)
    assert not found[0][3].isfinite() and sums[1][3].isnan()


@pytest.mark.skipif(native.kernels(torch.float32) is None, reason="no C++ compiler")
@pytest.mark.parametrize("size", [1, 15, 64, 1003, 8200])
@pytest.mark.parametrize("k", [1, 7, 64])
def test_the_compiled_first_few_are_the_eager_ones(size: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if k > size:
        return
    values = torch.randn(8, size, generator=torch.Generator().manual_seed(size))
    values[1] = values[1].round()  # many equals
    values[2], values[3, size // 2] = -INF, INF
    values[4, : size // 2] = -INF
    values[5], values[6] = -3.0, torch.arange(size)
    values[7, ::2], values[7, 1::2] = 0.0, -0.0
    found = top(values, k)
    monkeypatch.setattr(compiled_functions, "best_few", lambda *_: None)
    for ours, eager in zip(found, top(values, k), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.skipif(native.kernels(torch.float32) is None, reason="no C++ compiler")
def test_first_few_with_nan_are_within_the_row() -> None:
    values, index = top(torch.full((2, 100), NAN), 7)  # such a row is refused elsewhere
    assert not values.isnan().any() and (index == 0).all()

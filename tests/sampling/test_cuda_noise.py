"""The GPU's noise is the noise; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from dist_infer.sampling import noise
from dist_infer.sampling.cuda_noise import add_gumbel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("first", [0, 100_003])
def test_it_is_the_noise(first: int) -> None:
    keys = noise.row_keys([2**63 - 1, 5, 5], [0, 0, 1], [100, 7, 7])
    scaled = torch.randn(3, 3001, generator=torch.Generator().manual_seed(1))
    expected = scaled + noise.gumbel(keys, torch.arange(first, first + 3001))
    multipliers = (noise._signed(noise._STEP), noise._signed(noise._MIX1), noise._signed(noise._MIX2))
    found = add_gumbel(scaled.to(DEVICE), keys, first, multipliers).cpu()
    assert (found - expected).abs().max() < 1e-5

"""A whole decoder with the GPU's kernels, on CPU: torch's attention replaced by the formula, graphs by running again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dist_infer.distributed.collectives import SingleRank
from dist_infer.model import cuda_kernels
from dist_infer.model.attention import Attention
from dist_infer.model.batch import Batch, TokenSpan
from dist_infer.model.config import ModelConfig
from dist_infer.model.cuda_attention import attend_eagerly
from dist_infer.model.cuda_graphs import DecodeGraphs
from dist_infer.model.cuda_kernels import CudaKernels
from dist_infer.model.decoder import Decoder

BLOCK, WIDTH = 256, 2
CPU = torch.device("cpu")
TRAITS: dict[str, dict[str, Any]] = {
    "llama": {},
    "norms of heads": {"qk_norm": "head", "norm": "rms_unit"},
    "window": {"sliding_windows": (7, None)},
}


def decoder_of(traits: str, dtype: torch.dtype) -> Decoder:
    sizes = {"vocab_size": 61, "hidden_size": 48, "layers": 2, "heads": 6, "kv_heads": 2, "head_dim": 8, "ffn_size": 40}
    config = ModelConfig("llama", norm_eps=1e-5, max_position=2048, **sizes, **TRAITS[traits])
    decoder = Decoder(config, SingleRank(), CPU).to(dtype)
    generator = torch.Generator().manual_seed(3)
    for parameter in decoder.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() > 1 else 1))
    return decoder


def run(decoder: Decoder, forward: Callable[..., None] | None = None) -> list[Tensor]:
    """Logits of some steps: prompts side by side, then decodes of fewer and fewer of them."""
    generator = np.random.default_rng(1)
    cache = decoder.new_cache(9, BLOCK)
    forward = DecodeGraphs(decoder, cache, 4, WIDTH, CPU, record) if forward is None else forward
    lengths = [3, 260, 1, 17]
    tables = [np.array(pair, dtype=np.int32) for pair in ([5, 2], [1, 8], [3, 0], [7, 4])]
    found: list[Tensor] = []
    for count in (None, 4, 3, 1):
        spans = []
        for index in range(4 if count is None else count):
            tokens = generator.integers(0, 61, lengths[index] if count is None else 1).tolist()
            start = 0 if count is None else lengths[index]
            lengths[index] += count is not None
            spans.append(TokenSpan(tokens, start, tables[index]))
        forward(Batch.of(spans, BLOCK, decoder.rotary, CPU), cache, lambda logits, first: found.append(logits.clone()))
    return found


def record(work: Callable[[], None]) -> Callable[[], None]:
    """Running again, as a replay does."""
    work()
    return work


@pytest.mark.parametrize(
    ("traits", "dtype", "tolerance"), [*((name, torch.float32, 1e-5) for name in TRAITS), ("llama", torch.bfloat16, 0.05)]
)
@torch.no_grad()
def test_the_decoder_says_the_same(monkeypatch: pytest.MonkeyPatch, traits: str, dtype: torch.dtype, tolerance: float) -> None:
    monkeypatch.setattr(cuda_kernels, "attend_varlen", attend_eagerly)
    decoder = decoder_of(traits, dtype)
    expected = run(decoder, decoder)
    decoder.use(CudaKernels(compiled=False))
    for forward in (decoder, None):
        for ours, theirs in zip(run(decoder, forward), expected, strict=True):
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_layers_that_torch_cannot_do_are_left_alone() -> None:
    decoder = decoder_of("llama", torch.bfloat16)
    assert cuda_kernels.cuda_kernels(decoder, torch.bfloat16, BLOCK) is None, (
        "there is no GPU here" if not torch.cuda.is_available() else ""
    )


@pytest.mark.long
@torch.no_grad()
def test_what_inductor_makes_of_it_is_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_kernels, "attend_varlen", attend_eagerly)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    decoder = decoder_of("norms of heads", torch.float32)
    expected = run(decoder, decoder)
    decoder.use(CudaKernels(compiled=True))
    for ours, theirs in zip(run(decoder), expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert any((tmp_path / "dist_infer" / "inductor").iterdir())
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")


def test_what_decides_is_asked_of_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "works", lambda *_: True)
    decoder = decoder_of("llama", torch.bfloat16)
    assert cuda_kernels.cuda_kernels(decoder, torch.bfloat16, BLOCK, compiled=False) is not None
    assert cuda_kernels.cuda_kernels(decoder, torch.bfloat16, 16, compiled=False) is None
    last = [module for module in decoder.modules() if isinstance(module, Attention)][-1]
    last.softcap = 30.0
    assert cuda_kernels.cuda_kernels(decoder, torch.bfloat16, BLOCK, compiled=False) is None

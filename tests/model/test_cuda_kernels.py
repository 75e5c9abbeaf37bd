"""The GPU's elementwise kernels beside the formulas, and a whole decoder with them; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dist_infer.distributed.collectives import SingleRank
from dist_infer.model.batch import Batch, TokenSpan
from dist_infer.model.config import ModelConfig
from dist_infer.model.cuda_graphs import DecodeGraphs, Recorder, Recording, cuda_recorder
from dist_infer.model.cuda_kernels import CudaKernels
from dist_infer.model.decoder import Decoder
from dist_infer.model.rotary import rotate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK, WIDTH = 16, 3
TRAITS: dict[str, dict[str, Any]] = {
    "norms of heads, a window": {"qk_norm": "head", "norm": "rms_unit", "sliding_windows": (7, None)},
    "part of a head rotates, caps": {
        "rope": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        "attention_softcap": 5.0,
    },
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def normalized(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * (weight.float() + offset)


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found.float() - expected.float()).abs().max() <= TOLERANCE[found.dtype] * expected.float().abs().max())


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("size", [64, 100, 2048])
def test_norm_and_activation(dtype: torch.dtype, size: int) -> None:
    kernels = CudaKernels(DEVICE)
    x, delta, weight = random(7, size, dtype=dtype, seed=1), random(7, size, dtype=dtype, seed=2), random(size, dtype=dtype, seed=3)
    for added, offset in ((delta, 0.0), (None, 1.0)):
        stream = x.clone()
        total = x if added is None else x + added
        assert close(kernels.add_rms_norm(stream, added, weight, 1e-5, offset), normalized(total, weight, offset))
        assert close(stream, total)  # the interpreter cuts off where GPUs round
    gate_up = random(5, 2 * size, dtype=dtype, seed=4)
    gate, up = gate_up.float().chunk(2, dim=-1)
    assert close(kernels.silu_and_multiply(gate_up), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 32), (64, 0)])
@pytest.mark.parametrize("norms", [False, True])
def test_rotation_and_cache(dtype: torch.dtype, head_dim: int, rotary_dim: int, norms: bool) -> None:
    heads, kv_heads, tokens, block = 6, 2, 9, 4
    qkv = random(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype, seed=1)
    angles = torch.rand(tokens, rotary_dim // 2, generator=torch.Generator().manual_seed(2)) * 6
    angles = torch.cat((-angles, angles), -1)[:, None]
    cos, sin = angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype)
    weights = [random(head_dim, dtype=dtype, seed=seed) if norms else None for seed in (3, 4)]
    pools = torch.zeros(2, 12, kv_heads, block, head_dim, dtype=dtype, device=DEVICE)
    slots = (torch.randperm(44, generator=torch.Generator().manual_seed(5))[:tokens] + 4).to(DEVICE)
    parts = list(qkv.float().split((heads, kv_heads, kv_heads), dim=1))
    for place, weight in enumerate(weights):
        if weight is not None:
            parts[place] = normalized(parts[place], weight, 1.0).to(dtype).float()
    rotated = torch.cat(parts[:2], 1)
    if rotary_dim:
        rotate(rotated, cos.float(), sin.float())
    CudaKernels(DEVICE).rotate_and_cache(qkv, heads, cos, sin, *weights, 1e-5, 1.0, slots, pools[0], pools[1])
    assert close(qkv[:, :heads], rotated[:, :heads])
    keys, values = (pool[slots // block, :, slots % block] for pool in pools)
    assert close(keys, rotated[:, heads:]) and torch.equal(values.float(), parts[2])
    assert pools.count_nonzero() <= 2 * tokens * kv_heads * head_dim, "something was written beside the slots"


def decoder_of(traits: str) -> Decoder:
    sizes = {"vocab_size": 61, "hidden_size": 48, "layers": 2, "heads": 6, "kv_heads": 2, "head_dim": 16, "ffn_size": 40}
    config = ModelConfig("llama", norm_eps=1e-5, max_position=2048, **sizes, **TRAITS[traits])
    decoder = Decoder(config, SingleRank(), DEVICE).to(DEVICE)
    generator = torch.Generator().manual_seed(3)
    for parameter in decoder.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() > 1 else 1))
    return decoder


def run(decoder: Decoder, forward: Callable[..., None] | None = None) -> list[Tensor]:
    """Logits of some steps: prompts side by side, then decodes of fewer and fewer of them."""
    generator = np.random.default_rng(1)
    cache = decoder.new_cache(4 * WIDTH + 1, BLOCK)
    forward = DecodeGraphs(decoder, cache, 4, WIDTH, DEVICE, recorder()) if forward is None else forward
    lengths = [3, 36, 1, 17]
    tables = np.random.default_rng(2).permutation(4 * WIDTH).astype(np.int32).reshape(4, WIDTH) + 1
    found: list[Tensor] = []
    for count in (None, 4, 3, 1):
        spans = []
        for index in range(4 if count is None else count):
            tokens = generator.integers(0, 61, lengths[index] if count is None else 1).tolist()
            start = 0 if count is None else lengths[index]
            lengths[index] += count is not None
            spans.append(TokenSpan(tokens, start, tables[index]))
        forward(Batch.of(spans, BLOCK, decoder.rotary, DEVICE), cache, lambda logits, first: found.append(logits.clone()))
    return found


def recorder() -> Recorder:
    """Of CUDA graphs; without a GPU a replay is running again."""

    def again(work: Callable[[], None]) -> Recording:
        work()
        return SimpleNamespace(replay=work, reset=lambda: None)

    return cuda_recorder(DEVICE, SingleRank()) if DEVICE.type == "cuda" else again


@pytest.mark.parametrize("traits", TRAITS)
@torch.no_grad()
def test_the_decoder_says_the_same(traits: str) -> None:
    decoder = decoder_of(traits)
    expected = run(decoder, decoder)
    decoder.use(CudaKernels(DEVICE))
    for ours, theirs in zip(run(decoder), expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()

"""How much KV cache a rank holds, and what is said when it is too little."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dist_infer.config.engine import EngineOptions
from dist_infer.engine import memory
from dist_infer.engine.memory import GIB, KVPlan, free_bytes
from dist_infer.model.config import ModelConfig

CONFIG = ModelConfig("llama", 1000, 64, 128, layers=3, heads=9, kv_heads=3, head_dim=8, norm_eps=1e-5, max_position=512)
BLOCK = 2 * 3 * 3 * 16 * 8 * 4  # bytes of a block: keys and values, layers, KV heads, tokens, head_dim, float32


def make(free: int = GIB, tp: int = 1, fsdp: int = 1, longest: int = 512, dtype: torch.dtype = torch.float32, **options: object) -> KVPlan:
    return KVPlan.make(CONFIG, tp, fsdp, dtype, EngineOptions(**options), longest, free)  # type: ignore[arg-type]


def test_blocks_of_a_given_memory() -> None:
    plan = make(kv_cache_gib=100 * BLOCK / GIB)
    assert (plan.block_bytes, plan.blocks, plan.max_model_len) == (BLOCK, 100, 512)
    assert plan.note == "KV cache: 0.879 MiB a rank, 99 blocks of 16 tokens; 1,584 tokens in all, 3.1 times the longest sequence (512)"


def test_a_fraction_of_what_is_free_when_nothing_is_given() -> None:
    assert make(free=200 * BLOCK, kv_cache_fraction=0.25).blocks == 50


def test_fsdp_ranks_have_blocks_of_their_own() -> None:
    plan = make(kv_cache_gib=100 * BLOCK / GIB, fsdp=2)
    assert plan.blocks == 100
    assert "99 blocks of 16 tokens on each of 2 fsdp ranks; 3,168 tokens in all" in plan.note


def test_no_more_than_can_be_used() -> None:
    assert make(max_sequences=2).blocks == 2 * 512 // 16 + 1


def test_the_rank_with_most_kv_heads_decides() -> None:
    """9 heads over 3 at tp=4: heads 0-2, 3-4, 5-6, 7-8 or like it; some rank touches two KV heads."""
    assert make(tp=3).block_bytes == BLOCK // 3
    assert make(tp=2).block_bytes == BLOCK * 2 // 3
    assert make(tp=4).block_bytes == BLOCK * 2 // 3
    assert make(tp=9).block_bytes == BLOCK // 3
    assert make(dtype=torch.bfloat16).block_bytes == BLOCK // 2


def test_sequences_become_shorter_when_nobody_insists() -> None:
    plan = make(free=22 * BLOCK)  # half of it: 11 blocks, one of them nobody's
    assert (plan.blocks, plan.max_model_len) == (11, 160)
    assert plan.note.endswith("160 tokens in all, 1.0 times the longest sequence (160)")


@pytest.mark.parametrize(
    ("free", "options", "longest"),
    [
        (GIB, {"kv_cache_gib": 11 * BLOCK / GIB}, 512),
        (22 * BLOCK, {"max_model_len": 300}, 300),
        (GIB, {"kv_cache_gib": 2 * BLOCK / GIB}, 17),
    ],
)
def test_too_little_for_a_sequence_says_what_would_do(free: int, options: dict[str, float], longest: int) -> None:
    with pytest.raises(ValueError, match=r"^the KV cache \(.*\) holds \d+ tokens, but one sequence may have \d+: set .*$") as caught:
        make(free, longest=longest, **options)
    message = str(caught.value)
    shorter, more = re.findall(r"=([-\d.e]+) or", message)
    assert make(free, longest=int(shorter), **{**options, "max_model_len": int(shorter)}).max_model_len == int(shorter)
    assert make(free, longest=longest, **{**options, "kv_cache_gib": float(more)}).max_model_len == longest


@pytest.mark.parametrize("size", [1, 3, 16, 100, 999])
def test_the_memory_that_is_advised_suffices(size: int) -> None:
    with pytest.raises(ValueError, match=r"holds 0 tokens") as caught:
        make(kv_cache_gib=1e-9, block_size=size)
    assert "max_model_len=" not in str(caught.value)
    advised = re.findall(r"kv_cache_gib=([-\d.e]+) or higher", str(caught.value))[0]
    assert make(kv_cache_gib=float(advised), block_size=size).max_model_len == 512


def test_too_little_for_anything_although_nobody_insists() -> None:
    with pytest.raises(ValueError, match=r"holds 0 tokens, but one sequence may have 512: set engine\.kv_cache_gib="):
        make(free=BLOCK)


def test_free_memory_is_divided_between_the_ranks_of_a_node() -> None:
    alone, shared = free_bytes(torch.device("cpu"), 1), free_bytes(torch.device("cpu"), 4)
    assert 0 < shared < alone / 2


def test_a_control_group_limits_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_left_in_cgroup", lambda default: min(default, 1000))
    assert free_bytes(torch.device("cpu"), 4) == 250

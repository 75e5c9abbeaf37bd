"""How much KV cache a rank holds: computed, checked and said before a run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_infer.config.engine import EngineOptions
from dist_infer.model.config import ModelConfig
from dist_infer.model.weights import HeadCut

GIB = 1 << 30


@dataclass(frozen=True)
class KVPlan:
    """The KV cache of one rank.

    Attributes:
        blocks: Blocks, block 0 (nobody's) included.
        block_bytes: Bytes of a block on the rank that holds most KV heads.
        max_model_len: Longest sequence; less than asked when memory is short and nobody insisted.
        note: One line for the user.
    """

    blocks: int
    block_bytes: int
    max_model_len: int
    note: str

    @classmethod
    def make(
        cls, config: ModelConfig, tp: int, fsdp: int, dtype: torch.dtype, options: EngineOptions, max_model_len: int, free_bytes: int
    ) -> KVPlan:
        """Plan for `free_bytes`, the least that any rank has free.

        Raises:
            ValueError: The memory does not hold one sequence of `max_model_len` tokens.
        """
        cuts = [HeadCut.of(config, tp, rank).kv_heads for rank in range(tp)]
        heads = max(stop - start for start, stop in cuts)
        size = options.block_size
        block_bytes = 2 * config.layers * heads * size * config.head_dim * dtype.itemsize
        budget = int(options.kv_cache_gib * GIB if options.kv_cache_gib is not None else options.kv_cache_fraction * free_bytes)
        longest = -(-max_model_len // size)
        useful = options.max_sequences * longest
        blocks = min(budget // block_bytes - 1, useful)
        if blocks < longest:
            fits = max(blocks, 0) * size
            if options.kv_cache_gib is not None or options.max_model_len is not None or fits < 2:
                shorter = f"engine.max_model_len={fits} or lower, or " if fits >= 2 else ""
                enough = 1.01 * (longest + 1) * block_bytes / GIB  # more than what three digits round off
                raise ValueError(
                    f"the KV cache ({_gib(budget)}) holds {fits} tokens, but one sequence may have {max_model_len}: "
                    f"set {shorter}engine.kv_cache_gib={enough:.3g} or higher"
                )
            max_model_len = fits
        tokens = blocks * size * fsdp
        note = (
            f"KV cache: {_gib((blocks + 1) * block_bytes)} a rank, {blocks:,} blocks of {size} tokens"
            + (f" on each of {fsdp} fsdp ranks" if fsdp > 1 else "")
            + f"; {tokens:,} tokens in all, {tokens / max_model_len:.1f} times the longest sequence ({max_model_len:,})"
        )
        return cls(blocks + 1, block_bytes, max_model_len, note)


def free_bytes(device: torch.device, ranks: int) -> int:
    """Memory that one of `ranks` ranks may still take, which share the GPU `device`, or this host's memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps of memory that is free, after training steps nearly all
        return torch.cuda.mem_get_info(device)[0] // ranks
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    return min(available, _left_in_cgroup(available)) // ranks


def _left_in_cgroup(default: int) -> int:
    """What the control group (a batch job's or container's limit) still allows."""
    root = Path("/sys/fs/cgroup")
    try:
        group = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()[-1].rpartition(":")[2]
        place = next(p for p in (root / group.lstrip("/"), root) if (p / "memory.max").is_file())
        limit = (place / "memory.max").read_text(encoding="utf-8").strip()
        used = int((place / "memory.current").read_text(encoding="utf-8"))
    except (OSError, StopIteration, ValueError):
        return default
    return default if limit == "max" else max(int(limit) - used, 0)


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB / 100 else f"{count / 2**20:.3g} MiB"

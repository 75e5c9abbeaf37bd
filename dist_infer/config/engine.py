"""Limits of the engine: tokens a step, sequences at once, memory for the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from dist_infer.config.field import option


@dataclass
class EngineOptions:
    """Limits of one replica; the token and sequence budgets are per fsdp coordinate."""

    block_size: int = option(16, "token slots in a KV-cache block", low=1, high=1024)
    max_batch_tokens: int = option(2048, "tokens a step may compute", low=1)
    max_sequences: int = option(64, "sequences that may run at once", low=1)
    max_model_len: int | None = option(None, "longest sequence, prompt and output together; default: the model's", low=2)
    kv_cache_gib: float | None = option(None, "GiB of KV cache on each rank; default: kv_cache_fraction of what is free", above=0)
    kv_cache_fraction: float = option(
        0.5, "part of the free memory the KV cache may take when kv_cache_gib is not given", above=0, high=0.95
    )
    prefix_cache: bool = option(True, "reuse the KV blocks of prompts that begin alike")
    chunked_prefill: bool = option(True, "let a long prompt enter over several steps, beside running sequences")
    pack_weights: bool = option(True, "reorder weights once for the CPU's matrix units (fsdp=1 only)")
    native_kernels: bool = option(True, "compile small CPU kernels on first use, where a C++ compiler is found")
    cuda_graphs: bool = option(True, "replay decode steps on GPUs from recorded graphs")
    overlap: bool | None = option(None, "plan a step while the one before is computed; default: on GPUs")

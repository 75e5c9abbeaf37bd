"""The paged KV cache: for each layer a pool of blocks, [blocks, kv_heads, block_size, head_dim]."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_infer.model import huge_pages


class KVCache:
    """The KV blocks of one rank: its KV heads (tp) of its sequences (fsdp). Block 0 belongs to nobody."""

    def __init__(
        self, layers: int, blocks: int, kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (2, blocks, kv_heads, block_size, head_dim)
        self.block_size = block_size
        if device.type == "cpu":
            self._pools = [huge_pages.zeros(shape, dtype) for _ in range(layers)]
        else:
            self._pools = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.keys = [pool[0] for pool in self._pools]
        self.values = [pool[1] for pool in self._pools]

    def rows(self, slots: Tensor) -> Tensor:
        """[tokens * 2 * kv_heads] where `write` puts the heads of tokens whose `slots` [tokens] are given; the same in every layer."""
        _, blocks, kv_heads, block_size, _ = self._pools[0].shape
        heads = torch.arange(kv_heads, device=slots.device) * block_size
        heads = torch.cat((heads, heads + blocks * kv_heads * block_size))
        first = slots // block_size * (kv_heads * block_size) + slots % block_size
        return (first[:, None] + heads).view(-1)

    def write(self, layer: int, rows: Tensor, heads: Tensor) -> None:
        """Put `heads` [tokens, 2 * kv_heads, head_dim], keys and then values, into `rows` of `layer`."""
        head_dim = heads.shape[-1]
        self._pools[layer].view(-1, head_dim).index_copy_(0, rows, heads.reshape(-1, head_dim))

    def copy_blocks(self, sources: Tensor, targets: Tensor) -> None:
        """Copy whole blocks, in every layer."""
        for pool in self._pools:
            pool[:, targets] = pool[:, sources]

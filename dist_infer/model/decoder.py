"""The decoder: one model for every family, mesh, dtype and device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dist_infer.distributed.collectives import Communicator
from dist_infer.model.attention import Attention
from dist_infer.model.attention_plan import AttentionPlan
from dist_infer.model.batch import Batch
from dist_infer.model.cache import KVCache
from dist_infer.model.config import ModelConfig
from dist_infer.model.layers import GatedMLP, Linear, RMSNorm, VocabularyParallelEmbedding
from dist_infer.model.native import Kernels
from dist_infer.model.rotary import Rotary
from dist_infer.model.weights import HeadCut, cut

# Rows of logits made at a time: scoring wants thousands, and a row of a large vocabulary is half a megabyte.
LOGIT_ROWS = 256


class Block(nn.Module):
    """One layer: attention and mlp, each behind its norm and beside its residual."""

    def __init__(self, config: ModelConfig, layer: int, tp: Communicator, device: torch.device) -> None:
        super().__init__()
        ffn = cut(config.ffn_size, tp.size, tp.rank)
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, layer, tp, device)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(config.hidden_size, ffn[1] - ffn[0], config.mlp_bias, tp)

    def forward(
        self, x: Tensor, delta: Tensor | None, cos: Tensor, sin: Tensor, cache: KVCache, plan: AttentionPlan
    ) -> tuple[Tensor, Tensor]:
        """The residual stream `x` [tokens, hidden], and what the layer before has still to add to it; likewise out. `x` is overwritten."""
        attended = self.attention(self.attention_norm.after(x, delta), cos, sin, cache, plan)
        return x, self.mlp(self.mlp_norm.after(x, attended))


class Decoder(nn.Module):
    """A decoder-only language model; this rank's cut of it.

    Args:
        config: The architecture.
        tp: The ranks that heads, ffn and vocabulary are cut over.
        device: Where it computes.
    """

    def __init__(self, config: ModelConfig, tp: Communicator, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = cut(config.vocab_size, tp.size, tp.rank)
        self.rotary = Rotary(config, device)
        self.embedding = VocabularyParallelEmbedding(self.vocabulary, config.hidden_size, tp)
        self.blocks = nn.ModuleList(Block(config, layer, tp, device) for layer in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = Linear(config.hidden_size, self.vocabulary[1] - self.vocabulary[0], bias=False)
        if config.tied_head:
            self.head.weight = self.embedding.weight

    def new_cache(self, blocks: int, block_size: int = 16) -> KVCache:
        """An empty KV cache for this rank's heads; block 0 is nobody's, so `blocks` is one more than can be used."""
        weight = self.norm.weight
        kv_heads = HeadCut.of(self.config, self.embedding.tp.size, self.embedding.tp.rank).kv_heads
        heads = kv_heads[1] - kv_heads[0]
        return KVCache(self.config.layers, blocks, heads, block_size, self.config.head_dim, weight.dtype, self.rotary.device)

    def use(self, kernels: Kernels | None) -> None:
        """Let the layers compute with `kernels` where they can."""
        for module in self.modules():
            if isinstance(module, Attention | RMSNorm | GatedMLP):
                module.kernels = kernels

    def forward(self, batch: Batch, cache: KVCache, reduce: Callable[[Tensor, int], None]) -> None:
        """One step: the spans' keys and values enter the cache, the wanted logits go to `reduce`.

        Args:
            batch: The spans; may be empty, when only other ranks of the fsdp axis have work.
            cache: This rank's KV blocks.
            reduce: Called with float32 logits [rows, vocabulary of this rank] and the index of their
                first row among `batch.logit_rows`, a slice at a time, so that they never all exist at once.
        """
        x = self.embedding(batch.tokens)
        cos, sin = self.rotary.angles(batch.positions, batch.rope_lengths, x.dtype)
        delta = None
        for block in self.blocks:
            x, delta = block(x, delta, cos, sin, cache, batch.attention)
        assert delta is not None, "a model of no layers"
        rows = batch.logit_rows
        wanted = self.norm.after(x.index_select(0, rows), delta.index_select(0, rows))
        for start in range(0, len(wanted), LOGIT_ROWS):
            reduce(self.head(wanted[start : start + LOGIT_ROWS]).float(), start)

"""The decoder: one model for every family, mesh, dtype and device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dist_infer.distributed.collectives import Communicator
from dist_infer.model.attention import Attention
from dist_infer.model.attention_plan import AttentionPlan
from dist_infer.model.batch import Batch
from dist_infer.model.cache import KVCache
from dist_infer.model.config import ModelConfig
from dist_infer.model.layer import Layer
from dist_infer.model.layers import (
    MLP,
    GatedMLP,
    LayerNorm,
    Linear,
    PositionEmbedding,
    RMSNorm,
    Unnormalized,
    VocabularyParallelEmbedding,
    make_norm,
)
from dist_infer.model.moe import Experts, MoE
from dist_infer.model.native import Kernels, PackedMatrix
from dist_infer.model.native_blocks import NativeBlocks, fits
from dist_infer.model.rotary import Rotary, no_rotation
from dist_infer.model.weights import HeadCut, cut

# Rows of logits made at a time: scoring wants thousands, and a row of a large vocabulary is half a megabyte.
LOGIT_ROWS = 256


class Block(Layer):
    """One layer: attention and mlp, each beside its residual, with a norm before it, after it, or both."""

    def __init__(self, config: ModelConfig, layer: int, tp: Communicator, device: torch.device) -> None:
        super().__init__()
        ffn = cut(config.ffn_size, tp.size, tp.rank)
        before, after = config.norm_placement != "post", config.norm_placement != "pre"
        self.attention_norm = make_norm(config) if before else Unnormalized()
        self.attention = Attention(config, layer, tp, device)
        self.attention_post_norm = make_norm(config) if after else None
        self.mlp_norm = make_norm(config) if before else Unnormalized()
        if config.experts is not None and layer in config.experts.layers:
            self.mlp = MoE(config, tp)
        else:
            mlp = GatedMLP if config.gated_mlp else MLP
            self.mlp = mlp(config.hidden_size, ffn[1] - ffn[0], config.mlp_bias, tp, config.activation)
        self.mlp_post_norm = make_norm(config) if after else None
        self.parallel, self.scale = config.parallel_residual, config.residual_scale

    def forward(
        self, x: Tensor, delta: Tensor | None, cos: Tensor, sin: Tensor, cache: KVCache, plan: AttentionPlan, rows: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The residual stream `x` [tokens, hidden], and what the layer before has still to add to it; likewise out, of `rows` if given.

        `x` is overwritten.
        """
        attended = self.attention(self.attention_norm.after(x, delta), cos, sin, cache, plan, rows)
        x = x if rows is None else x.index_select(0, rows)
        attended = self._finish(attended, self.attention_post_norm)
        fed = self.mlp(self.mlp_norm.after(x, None if self.parallel else attended))
        fed = self._finish(fed, self.mlp_post_norm)
        return x, attended + fed if self.parallel else fed

    def _finish(self, branch: Tensor, norm: RMSNorm | LayerNorm | None) -> Tensor:
        """What a branch adds to the residual stream."""
        if norm is not None:
            branch = norm.after(branch, None)
        return branch if self.scale == 1 else branch * self.scale


class Decoder(Layer):
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
        self.rotations = [config.rotation(layer) for layer in range(config.layers)]
        self.rotary = Rotary(config, device)
        self.local_rotary = None if config.local_rope is None else Rotary(config, device, config.local_rope)
        self.embedding = VocabularyParallelEmbedding(self.vocabulary, config.hidden_size, tp)
        self.positions = PositionEmbedding(config.max_position, config.hidden_size) if config.learned_positions else None
        self.blocks = nn.ModuleList(Block(config, layer, tp, device) for layer in range(config.layers))
        self._native: NativeBlocks | None = None
        self.norm = make_norm(config)
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
        self._native = None
        for module in self.modules():
            if isinstance(module, Attention | RMSNorm | Linear | Experts):
                module.kernels = kernels

    def forward(self, batch: Batch, cache: KVCache, reduce: Callable[[Tensor, int], None]) -> None:
        """One step: the spans' keys and values enter the cache, the wanted logits go to `reduce`.

        Args:
            batch: The spans; may be empty, when only other ranks of the fsdp axis have work.
            cache: This rank's KV blocks.
            reduce: Called with float32 logits [rows, vocabulary of this rank] and the index of their
                first row among `batch.logit_rows`, a slice at a time, so that they never all exist at once.
        """
        x = self._embed(batch)
        angles = {rotation: self._angles(rotation, batch, x.dtype) for rotation in set(self.rotations)}
        turns = [angles[rotation] for rotation in self.rotations]
        delta, done, layers = None, 0, len(self.blocks)
        # Of the last layer nobody reads more than the wanted rows, once its keys and values are in the cache.
        wanted_rows = batch.logit_rows if len(batch.logit_rows) < len(x) else None
        native = self._native_blocks() if len(x) else None
        if native is not None:
            done = layers if wanted_rows is None else layers - 1
            delta = native.run(x, turns[:done], cache, batch.attention) if done else None
        for layer in range(done, layers):
            x, delta = self.blocks[layer](x, delta, *turns[layer], cache, batch.attention, wanted_rows if layer == layers - 1 else None)
        assert delta is not None, "a model of no layers"
        for start in range(0, len(x), LOGIT_ROWS):
            some = slice(start, start + LOGIT_ROWS)
            reduce(self._scaled(self._logits(x[some], delta[some])), start)

    def _logits(self, x: Tensor, delta: Tensor) -> Tensor:
        """float32 logits of rows of the residual stream [rows, hidden], to which the last layer has still to add `delta`."""
        norm, packed = self.norm, self.head.packed
        if isinstance(packed, PackedMatrix) and isinstance(norm, RMSNorm):
            return packed.logits(x, delta, norm.weight, norm.eps, norm.offset)
        return self.head(norm.after(x, delta)).float()

    def _native_blocks(self) -> NativeBlocks | None:
        """The blocks as compiled code computes them, as long as their weights are packed; None where some are of another kind."""
        blocks, kernels = cast("Sequence[Block]", self.blocks), self.head.kernels
        if self._native is None or not self._native.stand_for(blocks):
            self._native = None
            if kernels is not None and len(blocks) and all(map(fits, blocks)):
                self._native = NativeBlocks(blocks, self.embedding.tp, kernels)
        return self._native

    def _embed(self, batch: Batch) -> Tensor:
        """The residual stream as it begins, [tokens, hidden]."""
        x = self.embedding(batch.tokens)
        if self.config.embedding_scale != 1:
            x *= torch.tensor(self.config.embedding_scale, dtype=x.dtype)
        return x if self.positions is None else x + self.positions(batch.positions)

    def _angles(self, rotation: str, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of the step's tokens in layers that rotate like this."""
        if rotation == "none":
            return no_rotation(batch.positions, dtype)
        if rotation == "local" and self.local_rotary is not None:
            return self.local_rotary.angles(batch.positions, None, dtype)
        return self.rotary.angles(batch.positions, batch.rope_lengths, dtype)

    def _scaled(self, logits: Tensor) -> Tensor:
        """The logits as they are meant; overwritten."""
        scale, cap = self.config.logit_scale, self.config.logit_softcap
        if scale != 1:
            logits *= scale
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

"""A decoder that is transformers' own module, computing with our KV cache, mesh and steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dist_infer.distributed.collectives import Communicator
from dist_infer.model.attention_plan import AttentionPlan, Span
from dist_infer.model.batch import Batch
from dist_infer.model.cache import KVCache
from dist_infer.model.config import ModelConfig
from dist_infer.model.decoder import LOGIT_ROWS
from dist_infer.model.fallback.attention import PagedAttention
from dist_infer.model.fallback.cuts import Cuts
from dist_infer.model.fallback.module import Traits, build, give_attention
from dist_infer.model.native import Kernels
from dist_infer.model.rotary import Rotary
from dist_infer.model.weights import HeadCut, cut


class FallbackDecoder(nn.Module):
    """A language model of a family that has no decoder of ours; this rank's cut of it, made on the meta device.

    Args:
        config: The architecture, with transformers' configuration in `fallback`.
        tp: The ranks that its projections are cut over.
        device: Where it will compute.
        dtype: Type of its weights.

    Raises:
        ValueError: The module cannot be cut over `tp`.
    """

    def __init__(self, config: ModelConfig, tp: Communicator, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        assert config.fallback is not None
        self.config, self.tp, self.device, self.dtype = config, tp, device, dtype
        self.vocabulary = cut(config.vocab_size, tp.size, tp.rank)
        self.rotary = _Unscaled(device)
        self.model = build(config.fallback, dtype)
        self._body = Traits.of(self.model).body
        Cuts.of(self.model, tp.size, tp.rank).apply(self.model, tp)
        self._attention = PagedAttention()
        give_attention(self.model, self._attention)

    @property
    def blocks(self) -> list[nn.Module]:
        """Its layers."""
        lists = (module for module in self.model.modules() if isinstance(module, nn.ModuleList))
        return list(max(lists, key=lambda layers: (len(layers) == self.config.layers, sum(p.numel() for p in layers.parameters()))))

    @torch.no_grad()
    def restore(self) -> None:
        """Once there is memory for them, tie tied weights and compute the tables that are no weights."""
        for parameter in self.model.parameters():
            setattr(parameter, "_is_hf_initialized", True)  # noqa: B010  # they will be read
        self.model.initialize_weights()
        self.model.tie_weights()
        experts = getattr(self.model, "_can_set_experts_implementation", lambda: False)
        if experts():
            self.model.set_experts_implementation("eager")

    def check_fsdp(self, fsdp: int) -> None:
        """Check that `fsdp` ranks can share its parameters' rows.

        Raises:
            ValueError: They cannot share the experts of a layer evenly.
        """
        for name, parameter in self.model.named_parameters():
            if parameter.ndim > 2 and len(parameter) % fsdp:
                raise ValueError(
                    f"parallel.fsdp={fsdp}: {self.config.family} runs as transformers' own module, and the {len(parameter)} matrices of "
                    f"{name} cannot be shared evenly; fsdp must divide {len(parameter)}"
                )

    def new_cache(self, blocks: int, block_size: int = 16) -> KVCache:
        """An empty KV cache for this rank's heads; block 0 is nobody's, so `blocks` is one more than can be used."""
        first, stop = HeadCut.of(self.config, self.tp.size, self.tp.rank).kv_heads
        return KVCache(self.config.layers, blocks, stop - first, block_size, self.config.head_dim, self.dtype, self.device)

    def use(self, kernels: Kernels | None) -> None:
        """It has no use for compiled kernels."""

    def forward(self, batch: Batch, cache: KVCache, reduce: Callable[[Tensor, int], None]) -> None:
        """One step, as of `Decoder`."""
        idle = not len(batch.tokens)
        tokens, positions, plan = self._idle(cache) if idle else (batch.tokens, batch.positions, batch.attention)
        self._attention.enter(cache, plan)
        body = self.model.get_submodule(self._body)
        out = body(input_ids=tokens[None], position_ids=positions[None], use_cache=False)
        wanted = out.last_hidden_state[:, batch.logit_rows]
        for start in range(0, wanted.shape[1], LOGIT_ROWS):
            out.last_hidden_state = wanted[:, start : start + LOGIT_ROWS]
            reduce(self._logits(tokens, out).float(), start)

    def _logits(self, tokens: Tensor, out: nn.Module) -> Tensor:
        """What the model makes of its body's output: [rows, vocabulary of this rank]."""
        path, _, leaf = self._body.rpartition(".")
        place = self.model.get_submodule(path)
        body = place._modules[leaf]
        place._modules[leaf] = _Given(out)
        try:
            return self.model(input_ids=tokens[None], use_cache=False).logits[0]
        finally:
            place._modules[leaf] = body

    def _idle(self, cache: KVCache) -> tuple[Tensor, Tensor, AttentionPlan]:
        """A token for the block that is nobody's: modules cannot all compute with none, and others may wait for this rank."""
        none = torch.zeros(1, dtype=torch.long, device=self.device)
        blocks = none.to("cpu").numpy()
        return none, none, AttentionPlan([Span(0, 1, 1, blocks)], none, cache.block_size)


class _Unscaled(Rotary):
    """Says that keys do not depend on the length of their sequence; the module rotates them itself."""

    def __init__(self, device: torch.device) -> None:
        self.type, self.device, self.depends_on_length, self.threshold = "default", device, False, 0


class _Given(nn.Module):
    """Stands for a module whose output is known."""

    def __init__(self, output: object) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: object, **__: object) -> object:
        """The known output."""
        return self.output

"""What a decoder is made of, whoever trained it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one decoder-only language model. Sizes are global, before any cut.

    `rope` holds Hugging Face's `rope_parameters` (rope_type, rope_theta, factor, ...), in whose
    terms every trainer's rotary settings can be said. The rotary convention is always Hugging
    Face's (two halves): a dialect that stores interleaved pairs permutes the rows while reading.
    """

    family: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    max_position: int
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    tied_head: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_eps: float | None = None
    sliding_windows: tuple[int | None, ...] = ()
    dtype: str | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def head_norm_eps(self) -> float:
        """Epsilon of the query and key norms: the model's own unless the trainer has another for them."""
        return self.norm_eps if self.qk_norm_eps is None else self.qk_norm_eps

    def window(self, layer: int) -> int | None:
        """How many tokens back layer `layer` sees, itself included; None for all."""
        return self.sliding_windows[layer] if self.sliding_windows else None

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence it takes: `dynamic` rotary scaling stretches `max_position` by its factor."""
        factor = self.rope["factor"] if self.rope.get("rope_type") == "dynamic" else 1
        return int(self.max_position * factor)

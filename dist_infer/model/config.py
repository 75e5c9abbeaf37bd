"""What a decoder is made of, whoever trained it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ExpertsConfig:
    """The mixture of experts of a model, the same in every layer that has one.

    Attributes:
        count: Experts of a layer.
        chosen: Experts a token goes to.
        ffn_size: Of one expert.
        layers: Indices of the layers that have experts; the others have the dense mlp.
        shared_ffn_size: Of the expert that every token goes to; 0 for none.
        shared_gate: Whether the shared expert's output is scaled by a sigmoid gate of its own.
        scoring: How router logits become scores: "softmax" or "sigmoid".
        normalized: Whether the scores of the chosen experts are made to sum to 1.
        score_bias: Whether a stored bias is added to the router's scores; it counts for the choice only,
            unless `bias_in_score` says that it is part of the logits.
        bias_in_score: See `score_bias`.
        scale: Factor on the mixture.
    """

    count: int
    chosen: int
    ffn_size: int
    layers: tuple[int, ...]
    shared_ffn_size: int = 0
    shared_gate: bool = False
    scoring: str = "softmax"
    normalized: bool = True
    score_bias: bool = False
    bias_in_score: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one decoder-only language model. Sizes are global, before any cut.

    Layers are alike but for what `sliding_windows`, `unrotated_layers` and `experts` say. `rope` holds
    Hugging Face's `rope_parameters` (rope_type, rope_theta, factor, ...), in whose terms every
    trainer's rotary settings can be said. The rotary convention is always Hugging Face's (two
    halves): a dialect that stores interleaved pairs permutes the rows while reading.
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
    qk_norm: str | None = None  # "head": over each head; "full": over all heads of the layer together
    qk_norm_eps: float | None = None
    norm: str = "rms"  # "rms"; "rms_unit": the weight is stored less 1; "layer": mean and bias too
    norm_placement: str = "pre"  # of a layer's norms: "pre", "post" (of the branch's output), "both"
    parallel_residual: bool = False  # attention and mlp read the same stream
    activation: str = "silu"  # as transformers names it
    gated_mlp: bool = True
    learned_positions: bool = False  # a table of position embeddings instead of rotation
    local_rope: dict[str, Any] | None = None  # of the layers with a sliding window; None: `rope`
    unrotated_layers: tuple[int, ...] = ()
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what a layer's branches add
    logit_scale: float = 1.0
    experts: ExpertsConfig | None = None
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

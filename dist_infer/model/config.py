"""What a decoder is made of, whoever trained it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
NORMS = ("rms", "rms_unit", "layer")
PLACEMENTS = ("pre", "post", "both")
SCORINGS = ("softmax", "sigmoid")


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
        scale: Factor on the mixture of the chosen experts.

    Raises:
        ValueError: It cannot be computed.
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

    def __post_init__(self) -> None:
        """Check the numbers and the scoring."""
        if not 0 < self.chosen <= self.count:
            raise ValueError(f"{self.chosen} experts a token cannot be chosen of {self.count}")
        if self.scoring not in SCORINGS:
            raise ValueError(f"experts scoring {self.scoring!r} is not supported; supported are {', '.join(SCORINGS)}")


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one decoder-only language model. Sizes are global, before any cut.

    Layers are alike but for what `sliding_windows`, `unrotated_layers` and `experts` say. `rope` holds
    Hugging Face's `rope_parameters` (rope_type, rope_theta, factor, ...), in whose terms every
    trainer's rotary settings can be said. The rotary convention is always Hugging Face's (two
    halves): a dialect that stores interleaved pairs permutes the rows while reading.

    Raises:
        ValueError: A trait has a value that the decoder does not know.
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
    activation: str = "silu"  # as transformers names it, one of `ACTIVATIONS`
    gated_mlp: bool = True
    learned_positions: bool = False  # a table of position embeddings instead of rotation
    local_rope: dict[str, Any] | None = None  # of the layers with a sliding window; None: `rope`
    unrotated_layers: tuple[int, ...] = ()
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None  # scores are cap * tanh(score / cap)
    logit_softcap: float | None = None
    embedding_scale: float = 1.0  # rounded to the type it computes in
    residual_scale: float = 1.0  # of what a layer's branches add
    logit_scale: float = 1.0
    experts: ExpertsConfig | None = None
    sliding_windows: tuple[int | None, ...] = ()
    interleaved_rotary: bool | None = field(default=None, compare=False)  # how pairs lie on disk; None: as the dialect has them
    dtype: str | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    fallback: dict[str, Any] | None = None  # the transformers configuration of a model that runs as transformers' own module

    def __post_init__(self) -> None:
        """Check the traits that are words."""
        for name, valid in (
            ("activation", ACTIVATIONS),
            ("norm", NORMS),
            ("norm_placement", PLACEMENTS),
            ("qk_norm", (None, "head", "full")),
        ):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} {getattr(self, name)!r} is not supported; supported are {', '.join(map(str, valid))}")
        if self.qk_norm is not None and self.norm == "layer":
            raise ValueError(f"qk_norm {self.qk_norm!r} is not supported beside norm 'layer'; supported is None")
        if self.local_rope is not None and self.local_rope.get("rope_type") in ("dynamic", "longrope"):
            raise ValueError(f"rope_type {self.local_rope['rope_type']!r} of layers with a sliding window is not supported")

    @property
    def head_norm_eps(self) -> float:
        """Epsilon of the query and key norms: the model's own unless the trainer has another for them."""
        return self.norm_eps if self.qk_norm_eps is None else self.qk_norm_eps

    @property
    def norm_offset(self) -> float:
        """What is added to the stored weights of all norms."""
        return 1.0 if self.norm == "rms_unit" else 0.0

    def window(self, layer: int) -> int | None:
        """How many tokens back layer `layer` sees, itself included; None for all."""
        return self.sliding_windows[layer] if self.sliding_windows else None

    def rotation(self, layer: int) -> str:
        """How layer `layer` rotates queries and keys: "global" by `rope`, "local" by `local_rope`, or "none"."""
        if self.learned_positions or layer in self.unrotated_layers:
            return "none"
        return "local" if self.local_rope is not None and self.window(layer) is not None else "global"

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence it takes: `dynamic` rotary scaling stretches `max_position` by its factor."""
        factor = self.rope["factor"] if self.rope.get("rope_type") == "dynamic" else 1
        return int(self.max_position * factor)

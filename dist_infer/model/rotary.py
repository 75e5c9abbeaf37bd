"""Rotary position embeddings: every scaling transformers knows, computed by its own functions.

Two scalings depend on how long a sequence is (`dynamic`, `longrope`). Their regime is chosen for
each sequence: the token at `position` is rotated for the length `max(anchor, position + 1)`,
where the anchor is the length the sequence had when it was admitted. That is what
transformers' `generate` does with a cache, without being moved by neighbours in the batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dist_infer.model.config import ModelConfig

LENGTH_DEPENDENT = ("dynamic", "longrope")


class Rotary:
    """The rotation angles of a model's layers, those that rotate alike.

    Args:
        config: The model.
        device: Where angles are computed.
        rope: Hugging Face's `rope_parameters` of these layers; default: those the model has.

    Raises:
        ValueError: The rope type is not known to transformers.
    """

    def __init__(self, config: ModelConfig, device: torch.device, rope: dict[str, Any] | None = None) -> None:
        rope = config.rope if rope is None else rope
        self.type = rope.get("rope_type", "default")
        if self.type != "default" and self.type not in ROPE_INIT_FUNCTIONS:
            raise ValueError(f"rope_type {self.type!r} is not known; known are default, {', '.join(ROPE_INIT_FUNCTIONS)}")
        self.device = device
        self.depends_on_length = self.type in LENGTH_DEPENDENT
        self.threshold = int(rope.get("original_max_position_embeddings") or config.max_position)
        if self.type == "dynamic":
            self.threshold = config.max_position
        # The functions read a transformers configuration; only these fields matter to them.
        self._config = LlamaConfig(
            hidden_size=config.heads * config.head_dim,
            num_attention_heads=config.heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position,
            rope_parameters=dict(rope),
        )
        self._dim = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
        self._base = self._frequencies(None)
        self._scaled: dict[int, tuple[Tensor, float]] = {}

    def regime(self, length: int) -> int:
        """The regime of a sequence of `length` tokens; sequences of equal regimes share cached keys. 0 is the unscaled one."""
        if not self.depends_on_length or length <= self.threshold:
            return 0
        return 1 if self.type == "longrope" else length

    def angles(self, positions: Tensor, lengths: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, each [tokens, 1, rotary_dim], as `rotate` wants them: the first half of the sines is negative.

        Args:
            positions: [tokens] position of each token in its sequence.
            lengths: [tokens] length that decides each token's regime; None when none can leave the first regime.
            dtype: Type of the result; the angles themselves are computed in float32.
        """
        frequencies, scale = self._base
        angles = positions[:, None] * frequencies
        factor: float | Tensor = scale
        if self.depends_on_length and lengths is not None:
            factor = torch.full((len(positions), 1), scale, device=self.device)
            for length in torch.unique(lengths[lengths > self.threshold]).tolist():
                rows = lengths == length
                scaled, scale = self._at(self.regime(length), length)
                angles[rows] = positions[rows, None] * scaled
                factor[rows] = scale
        cos, sin = angles.cos(), angles.sin()
        if isinstance(factor, Tensor) or factor != 1:
            cos, sin = cos * factor, sin * factor
        return cos.to(dtype)[:, None], sin.to(dtype)[:, None]

    def _at(self, regime: int, length: int) -> tuple[Tensor, float]:
        if regime not in self._scaled:
            if len(self._scaled) > 4096:
                self._scaled.clear()
            self._scaled[regime] = self._frequencies(length)
        return self._scaled[regime]

    def _frequencies(self, length: int | None) -> tuple[Tensor, float]:
        """Inverse frequencies [rotary_dim], the first half negative, and the factor on cos and sin, for a sequence of `length` tokens."""
        scale = 1.0
        with torch.device("cpu"):  # whatever device a model is being built on
            if self.type == "default":
                base = float(self._config.rope_parameters["rope_theta"])  # type: ignore[index]
                frequencies = 1.0 / base ** (torch.arange(0, self._dim, 2, dtype=torch.float) / self._dim)
            else:
                frequencies, scale = ROPE_INIT_FUNCTIONS[self.type](self._config, torch.device("cpu"), seq_len=length)
        return torch.cat((-frequencies, frequencies)).to(self.device), scale


def no_rotation(positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of layers that do not rotate: [tokens, 1, 0]."""
    none = torch.empty(len(positions), 1, 0, dtype=dtype, device=positions.device)
    return none, none


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate `x` [tokens, heads, head_dim] by its positions, in place, in Hugging Face's convention (two halves)."""
    x = x[..., : cos.shape[-1]]
    turned = x.roll(x.shape[-1] // 2, -1)
    x.mul_(cos).addcmul_(turned, sin)

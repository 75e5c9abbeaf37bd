"""Mixtral: Mistral whose mlps are mixtures of experts."""

from __future__ import annotations

import re
from typing import Any

from dist_infer.model.config import ExpertsConfig, ModelConfig
from dist_infer.model.families import mistral
from dist_infer.model.stored import Stored

_PROJECTIONS = {"gate": "w1", "up": "w3", "down": "w2"}


def traits(config: Any) -> dict[str, Any]:
    """What sets Mixtral apart: every layer has experts, weighed by a softmax over the chosen ones."""
    experts = ExpertsConfig(
        count=config.num_local_experts,
        chosen=config.num_experts_per_tok,
        ffn_size=config.intermediate_size,
        layers=tuple(range(config.num_hidden_layers)),
    )
    return {**mistral.traits(config), "experts": experts}


def stored(name: str, config: ModelConfig) -> Stored:
    """Its mlp and the experts' projections have names of their own."""
    name = re.sub(r"(\.experts\.\d+)\.(gate|up|down)_proj\.", lambda found: f"{found[1]}.{_PROJECTIONS[found[2]]}.", name)
    return Stored(name.replace(".mlp.", ".block_sparse_moe."))

"""transformers' own module for a model: built without memory, and asked what its attention does."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForCausalLM, PreTrainedModel

ATTENTION = "dist_infer"  # our attention's name among transformers' implementations
NO_INTERFACE = "its attention is not called through transformers' attention interface, or it has none"
META = torch.device("meta")


def configuration(settings: dict[str, Any]) -> Any:
    """transformers' configuration for `settings`, which is what its `to_dict` gave."""
    return CONFIG_MAPPING[settings["model_type"]].from_dict(dict(settings))


def settings_of(config: Any) -> dict[str, Any]:
    """A transformers configuration as plain values."""
    return json.loads(json.dumps(config.to_dict(), default=str))


def build(settings: dict[str, Any], dtype: torch.dtype, device: torch.device = META, attention: str = ATTENTION) -> PreTrainedModel:
    """The module, in evaluation mode; on the meta device its weights take no memory.

    Weights that transformers registers as buffers become parameters: what is read from a checkpoint is a parameter with us.
    """
    with device:
        model = AutoModelForCausalLM.from_config(configuration(settings), attn_implementation=attention, dtype=dtype)
        if hasattr(model, "set_experts_implementation") and model._can_set_experts_implementation():
            model.set_experts_implementation("eager" if device != META else "batched_mm")
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name not in module._non_persistent_buffers_set and buffer.is_floating_point():
                delattr(module, name)
                module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
    exact = re.compile("|".join(rf"(^|\.){name}(\.|$)" for name in model._keep_in_fp32_modules_strict or ()) or "$^")
    for name, parameter in model.named_parameters():
        if exact.search(name):  # transformers does not round these
            parameter.data = parameter.data.float()
    return model.eval().requires_grad_(False)


def give_attention(model: PreTrainedModel, attention: Any) -> None:
    """Let the attention layers of `model`, built with ours, compute with `attention.attend`."""
    for module in model.modules():
        module.dist_infer_attention = attention


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> tuple[Tensor, None]:
    """What transformers' attention layers call: queries, keys and values [1, heads, tokens, head_dim] -> [1, tokens, heads, head_dim]."""
    if attention_mask is not None:
        raise ValueError("its attention has a mask of its own")
    attention: Any = module.dist_infer_attention
    return attention.attend(module.layer_idx, query, key, value, **options), None


AttentionInterface.register(ATTENTION, _attend)


@dataclass
class Traits:
    """What a run of the module on the meta device shows.

    Attributes:
        body: Name of the part whose output the head reads.
        layers: For each call of attention its layer, query heads, KV heads, and head sizes of keys and values.
    """

    body: str = ""
    layers: list[tuple[int, int, int, int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, model: PreTrainedModel) -> Traits:
        """Run `model`, which is on the meta device, on a few tokens.

        Raises:
            ValueError: It is not made of attention layers that can be given another implementation.
        """
        traits = cls()
        give_attention(model, traits)
        bodies = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel) and name}
        called: list[str] = []
        hooks = [module.register_forward_pre_hook(lambda *_, name=name: called.append(name)) for name, module in bodies.items()]
        try:
            with META, torch.no_grad():
                model(input_ids=torch.zeros(1, 5, dtype=torch.long), position_ids=torch.arange(5)[None], use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        if not traits.layers:
            raise ValueError(NO_INTERFACE)
        if sorted(layer[0] for layer in traits.layers) != list(range(len(traits.layers))):
            raise ValueError("not every layer calls attention just once")
        if not called:
            raise ValueError("it has no body apart from its head")
        traits.body = called[0]
        return traits

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        """Take note of the shapes."""
        self.layers.append((layer, query.shape[1], key.shape[1], key.shape[3], value.shape[3]))
        return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def matrix_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a parameter as rows and columns: leading dims of a pack of matrices are rows too; vectors stay vectors."""
    return tuple(shape) if len(shape) < 2 else (math.prod(shape[:-1]), shape[-1])


def parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has the parameter `name`, and what it calls it."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Its plain projections by name."""
    return ((name, module) for name, module in model.named_modules() if type(module) is nn.Linear)

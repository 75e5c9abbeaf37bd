"""The fallback: a family that has no decoder of ours runs as transformers' own module.

Nothing of a checkpoint is executed: the module's code is transformers' own. Weights are read by our loader, attention reads our
paged cache, tp follows transformers' plan. What does not compute alike that way is refused before any weight is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dist_infer.distributed.collectives import Communicator
from dist_infer.model.config import ModelConfig
from dist_infer.model.fallback import cuts
from dist_infer.model.fallback.comparison import check, check_alone
from dist_infer.model.fallback.decoder import FallbackDecoder
from dist_infer.model.fallback.layout import layout_of
from dist_infer.model.fallback.module import ATTENTION, NO_INTERFACE, Traits, build, configuration, settings_of
from dist_infer.model.stored import Stored
from dist_infer.model.weights import Weight

__all__ = ["FallbackDecoder", "check_cut", "cuts_heads", "describe", "from_hf", "held", "landmark", "stored"]

_LENGTH_DEPENDENT = ("dynamic", "longrope")


def from_hf(config: Any) -> ModelConfig:
    """The ModelConfig of a transformers configuration whose family has no decoder of ours.

    Raises:
        ValueError: The model cannot run as transformers' module on our cache; the reason is named.
    """
    try:
        _refuse(config)
        ours = _model_config(config)
        layout_of(settings_of(config))
        check_alone(config, _model_config)
    except ValueError as error:
        raise ValueError(f"model_type {config.model_type!r} cannot run as transformers' own module: {error}") from None
    return ours


def describe(config: ModelConfig, tp: int = 1, rank: int = 0) -> Iterator[Weight]:
    """Every weight that tp rank `rank` of `tp` holds.

    Raises:
        ValueError: The model cannot be cut into `tp`.
    """
    assert config.fallback is not None
    if cuts_heads(config) and (config.kv_heads % tp or config.heads % tp):
        sizes = f"{config.heads} query heads over {config.kv_heads} KV heads"
        raise ValueError(f"parallel.tp={tp}: {config.family} runs as transformers' own module, whose {sizes} tp must divide")
    return layout_of(config.fallback).weights(tp, rank)


def cuts_heads(config: ModelConfig) -> bool:
    """Whether tp gives each rank heads of its own; else every rank computes, and keeps in its cache, those of all."""
    assert config.fallback is not None
    return cuts.cuts_heads(layout_of(config.fallback).model)


def stored(name: str, config: ModelConfig) -> Stored:
    """Where the canonical tensor `name` is stored."""
    assert config.fallback is not None
    return layout_of(config.fallback).stored(name)


def held(name: str, config: ModelConfig) -> Stored:
    """Where transformers' module keeps the canonical tensor `name` in memory, and whoever saves the module as it is."""
    assert config.fallback is not None
    layout = layout_of(config.fallback)
    return layout.held.get(name) or layout.stored(name)


def landmark(config: ModelConfig) -> str:
    """Stored name of the token embedding, which every model has."""
    assert config.fallback is not None
    return layout_of(config.fallback).embedding


def check_cut(config: ModelConfig, tp: Communicator, device: torch.device) -> None:
    """Check, with all ranks of `tp`, that the model computes alike when it is cut over them.

    Raises:
        ValueError: It does not.
    """
    assert config.fallback is not None
    if tp.size == 1:
        return
    try:
        check(configuration(config.fallback), _model_config, tp, device)
    except ValueError as error:
        raise ValueError(
            f"parallel.tp={tp.size}: {config.family} runs as transformers' own module, and {error}; use parallel.tp=1"
        ) from None


def _refuse(config: Any) -> None:
    """Raise ValueError for what a configuration says plainly."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if config.is_encoder_decoder:
        raise ValueError("it is an encoder and a decoder")
    if config.get_text_config() is not config:
        raise ValueError("its language model is a part of a larger one; give the language model's own checkpoint and configuration")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError("transformers has no causal language model for it")
    if getattr(config, "quantization_config", None):
        raise ValueError("its weights are quantized")
    for rope in _ropes(getattr(config, "rope_parameters", None)):
        if rope.get("rope_type") in _LENGTH_DEPENDENT:
            raise ValueError(f"rope_type {rope['rope_type']!r} turns keys by the length of the sequence")


def _ropes(parameters: Any) -> Iterator[dict[str, Any]]:
    """Rotary parameters, of all kinds of layers."""
    if isinstance(parameters, dict):
        yield parameters
        for entry in parameters.values():
            yield from _ropes(entry)


def _model_config(config: Any) -> ModelConfig:
    """What the engine needs to know of the model, partly seen in a run of the module on the meta device."""
    settings = settings_of(config)
    try:
        model = build(settings, torch.float32)
        traits = Traits.of(model)
        layers, query_heads, kv_heads, *sizes = zip(*traits.layers, strict=True)
    except ValueError:
        raise
    except Exception as error:  # whatever a module of transformers makes of our calls
        if isinstance(error, KeyError) and error.args == (ATTENTION,):
            raise ValueError(NO_INTERFACE) from None
        raise ValueError(f"{type(error).__name__} as it was tried: {' '.join(str(error).split())[:160]}") from None
    if not isinstance(getattr(config, "max_position_embeddings", None), int):
        raise ValueError("its configuration has no max_position_embeddings")
    if len(set(query_heads)) > 1 or len(set(kv_heads)) > 1:
        raise ValueError("its layers have different numbers of heads")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None or len(head.weight) != config.vocab_size:
        raise ValueError("its head does not give a logit for each token")
    eos = config.eos_token_id
    return ModelConfig(
        family=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        ffn_size=getattr(config, "intermediate_size", None) or 0,
        layers=len(layers),
        heads=query_heads[0],
        kv_heads=kv_heads[0],
        head_dim=max(map(max, sizes)),
        norm_eps=0.0,  # the module has its own
        max_position=config.max_position_embeddings,
        tied_head=head.weight is embedding.weight,
        dtype=str(config.dtype).removeprefix("torch.") if config.dtype is not None else None,
        bos_token_id=config.bos_token_id,
        eos_token_ids=tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,),
        fallback=settings,
    )

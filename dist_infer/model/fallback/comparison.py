"""Whether transformers' module computes with our cache, spans and cuts what it computes alone: seen on a small model of its kind."""

from __future__ import annotations

import json
import math
import re
from copy import deepcopy
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from dist_infer.distributed.collectives import Communicator, SingleRank
from dist_infer.model.batch import Batch, TokenSpan
from dist_infer.model.fallback.decoder import FallbackDecoder
from dist_infer.model.fallback.layout import layout_of
from dist_infer.model.fallback.module import build, configuration, settings_of

TOLERANCE = 1e-4  # of the largest logit, in float32
_LENGTHS = (23, 14)
_CUTS = ((5, 6, 9, 16, 17, 23), (3, 4, 12, 13, 14))  # where the spans of each sequence end
_THRESHOLDS = re.compile(r"window|chunk|topk|top_k|stride|block|sparse|floor_scale|original_max_position_embeddings")


def check_alone(config: Any, describe: Any) -> None:
    """Compare our run of a small model of the kind of `config`, a transformers configuration, with its own.

    Args:
        config: A transformers configuration.
        describe: Makes a ModelConfig of one.

    Raises:
        ValueError: They differ, or one of them fails.
    """
    _check_remembered(json.dumps(settings_of(config), sort_keys=True), describe)


@lru_cache(maxsize=8)
def _check_remembered(key: str, describe: Any) -> None:
    check(configuration(json.loads(key)), describe, SingleRank(), torch.device("cpu"))


def check(config: Any, describe: Any, tp: Communicator, device: torch.device) -> None:
    """`check_alone`, over the ranks of `tp`, which call this together.

    Raises:
        ValueError: On every rank alike.
    """
    reason = ""
    try:
        difference = _difference(shrunken(config, tp.size), describe, tp, device)
        if not difference <= TOLERANCE:
            reason = f"its logits differ by {difference:.1g} of the largest"
    except Exception as error:  # whatever a module of transformers makes of our calls
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    failed = tp.all_reduce(torch.tensor([float(bool(reason))], device=device))
    if failed.item():
        raise ValueError(f"a small model of its kind does not compute alike in spans over a paged cache ({reason or 'on another rank'})")


def shrunken(config: Any, tp: int = 1) -> Any:
    """A configuration of the same kind with few heads, layers and tokens; its thresholds are so low that short sequences pass them."""
    small = deepcopy(config)
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    few_kv = min(kv_heads, 2 * tp)
    few = few_kv * min(heads // kv_heads, 2) if kv_heads < heads else 2 * tp
    sizes: dict[str, Any] = {
        "num_attention_heads": few,
        "num_key_value_heads": few if kv_heads == heads else few_kv,
        "hidden_size": few * head_dim,
        "word_embed_proj_dim": few * head_dim,
        "vocab_size": 61,
        "pad_token_id": 1,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    for name in [name for name in vars(config) if "intermediate_size" in name or name in ("ffn_dim", "n_inner", "ffn_hidden_size")]:
        if isinstance(getattr(config, name), int):
            sizes[name] = 24 * tp
    for name, value in sizes.items():
        if getattr(config, name, None) is not None:
            setattr(small, name, value)
    for name, value in vars(config).items():
        if _THRESHOLDS.search(name) and not name.endswith("layers") and type(value) is int and value > 8:
            setattr(small, name, 4)
        elif isinstance(value, dict):
            setattr(small, name, _low(value))
    _few_layers(config, small)
    return small


def _low(value: Any) -> Any:
    """A dict, as of rotary parameters, with low thresholds."""
    if not isinstance(value, dict):
        return value
    return {name: 8 if name == "original_max_position_embeddings" else _low(entry) for name, entry in value.items()}


def _few_layers(config: Any, small: Any) -> None:
    """Keep one layer of each kind, and three at least."""
    layers = config.num_hidden_layers
    lists = {name: value for name, value in vars(config).items() if isinstance(value, list | tuple) and len(value) == layers}
    kinds = list(zip(*(map(str, value) for value in lists.values()), strict=True)) if lists else [()] * layers
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    kept = sorted({*first, *[layer for layer in range(layers) if layer not in first][: max(0, 3 - len(first))]})
    for name, value in lists.items():
        setattr(small, name, [value[layer] for layer in kept])
    for name in ("first_k_dense_replace", "moe_layer_start_index"):
        if isinstance(getattr(config, name, None), int):
            setattr(small, name, min(getattr(config, name), 1))
    small.num_hidden_layers = len(kept)


@torch.no_grad()
def _difference(config: Any, describe: Any, tp: Communicator, device: torch.device) -> float:
    """The largest difference of logits, as a share of the largest logit."""
    settings = settings_of(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        alone = build(settings, torch.float32, torch.device("cpu"), "eager")
        _randomize(alone)
        prompts = [torch.randint(config.vocab_size, (length,)).tolist() for length in _LENGTHS]
    decoder = FallbackDecoder(describe(config), tp, device, torch.float32)
    decoder.to_empty(device=device)
    decoder.restore()
    _fill(decoder, alone)
    found = _run(decoder, prompts, device)
    worst = 0.0
    for prompt, logits in zip(prompts, found, strict=True):
        for expected in _alone(alone, prompt):
            mine = expected[:, slice(*decoder.vocabulary)]
            worst = max(worst, ((mine - logits.cpu()).abs().max() / expected.abs().max()).item())
            if not math.isfinite(worst) or mine.std() == 0:
                return math.inf
    return worst


def _randomize(model: PreTrainedModel) -> None:
    """Weights that make every layer's output matter."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            inputs = 1 if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding) else parameter.shape[-1]
            parameter.normal_(std=inputs**-0.5)
        else:
            parameter.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.3)


def _fill(decoder: FallbackDecoder, alone: PreTrainedModel) -> None:
    """Give the decoder its part of the weights of `alone`, by way of how they are stored."""
    stored = revert_weight_conversion(alone, alone.state_dict())
    assert decoder.config.fallback is not None
    layout = layout_of(decoder.config.fallback)
    parameters = dict(decoder.named_parameters())
    for weight in layout.weights(decoder.tp.size, decoder.tp.rank):
        target = parameters[weight.parameter].view(weight.shape)
        for piece in weight.pieces:
            place = layout.stored(piece.name)
            source = stored[place.tensor] if place.member is None else stored[place.tensor][place.member]
            region = tuple(slice(*bounds) for bounds in piece.box)
            target[piece.row : piece.row + piece.rows].copy_(source.view(piece.shape)[region])


def _run(decoder: FallbackDecoder, prompts: list[list[int]], device: torch.device) -> list[Tensor]:
    """Logits of all positions; the prompts enter side by side, in spans of unequal lengths, into blocks that lie in disorder."""
    size = 4
    tables = [np.array([9, 2, 5, 1, 7, 11], dtype=np.int32), np.array([3, 8, 4, 10], dtype=np.int32)]
    cache = decoder.new_cache(12, size)
    parts: list[list[Tensor]] = [[] for _ in prompts]
    for step in range(max(map(len, _CUTS))):
        spans, active = [], []
        for index, (prompt, ends) in enumerate(zip(prompts, _CUTS, strict=True)):
            if step < len(ends):
                start = ends[step - 1] if step else 0
                active.append((index, ends[step] - start))
                spans.append(TokenSpan(prompt[start : ends[step]], start, tables[index], ends[step] - start))
        rows: list[Tensor] = []
        decoder(Batch.of(spans, size, decoder.rotary, device), cache, lambda logits, _, rows=rows: rows.append(logits))
        for (index, _), part in zip(active, torch.cat(rows).split([length for _, length in active]), strict=True):
            parts[index].append(part)
    return [torch.cat(part) for part in parts]


def _alone(model: PreTrainedModel, prompt: list[int]) -> list[Tensor]:
    """Logits of all positions by the module alone: in one pass, and in two with transformers' cache."""
    tokens = torch.tensor([prompt])
    begun = model(input_ids=tokens[:, :-4], use_cache=True)
    logits, cache = [begun.logits[0]], begun.past_key_values
    for at in range(len(prompt) - 4, len(prompt)):
        out = model(input_ids=tokens[:, at : at + 1], past_key_values=cache, use_cache=True)
        logits, cache = [*logits, out.logits[0]], out.past_key_values
    return [model(input_ids=tokens, use_cache=False).logits[0], torch.cat(logits)]

"""Sampling parameters from a model's generation_config.json, and their check against a vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dist_infer.config.sampling import SamplingParams

# transformers' settings that would change the output and are not known here, with the values that leave it as it is.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "constraints": (None, []),
    "diversity_penalty": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1),
    "max_time": (None,),
    "min_length": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0),
    "sequence_bias": (None, {}, []),
    "suppress_tokens": (None, []),
    "typical_p": (None, 1),
    "watermarking_config": (None, {}),
}


@dataclass(frozen=True)
class GenerationDefaults:
    """What a generation_config.json says.

    Attributes:
        params: Its sampling parameters; what it does not name stays None.
        eos_ids: End tokens; empty when it names none.
        max_length: Most tokens of prompt and output together, if it says so.
        warnings: One line for each setting that would change the output and is not supported.
    """

    params: SamplingParams
    eos_ids: tuple[int, ...]
    max_length: int | None
    warnings: list[str]


def defaults_from_generation_config(config: dict[str, Any]) -> GenerationDefaults:
    """The defaults that a generation_config.json stands for, read as transformers reads it.

    `do_sample` decides: unless it is true, the default is greedy, whatever temperature stands beside it. Filters and penalties
    hold for requests that ask for a temperature of their own. Only settings in the file count, not transformers' own defaults
    (its top_k of 50 for instance).

    Args:
        config: The parsed file.

    Raises:
        ValueError: A value is out of its range.
    """

    temperature = _number(config, "temperature")
    try:
        params = SamplingParams(
            max_tokens=_whole(config, "max_new_tokens"),
            min_tokens=_whole(config, "min_new_tokens"),
            temperature=0.0 if not config.get("do_sample") else 1.0 if temperature is None else temperature,
            top_k=_whole(config, "top_k"),
            top_p=_number(config, "top_p"),
            min_p=_number(config, "min_p"),
            repetition_penalty=_number(config, "repetition_penalty"),
            stop=config.get("stop_strings"),
        )
    except ValueError as error:
        raise ValueError(f"generation_config.json: {error}") from error
    eos = config.get("eos_token_id")
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    # As in transformers, max_new_tokens goes before max_length.
    max_length = _whole(config, "max_length") if params.max_tokens is None else None
    warnings = [
        f"generation_config.json: {name}={config[name]!r} is not supported and left out"
        for name, neutral in _UNSUPPORTED.items()
        if name in config and config[name] not in neutral
    ]
    return GenerationDefaults(params, eos_ids, max_length, warnings)


def _number(config: dict[str, Any], name: str) -> float | None:
    """A number of the file, None where it is not given."""
    value = config.get(name)
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise ValueError(f"generation_config.json: {name}={value!r}: must be a number")


def _whole(config: dict[str, Any], name: str) -> int | None:
    """A whole number of the file, None where it is not given."""
    value = _number(config, name)
    if value is None or value == int(value):
        return None if value is None else int(value)
    raise ValueError(f"generation_config.json: {name}={value!r}: must be a whole number")


def check(params: SamplingParams, vocab_size: int) -> None:
    """Raise ValueError if `params` names a token id outside the vocabulary, or a bias that is no number."""
    for name, ids in (("stop_token_ids", params.stop_token_ids or []), ("logit_bias", params.logit_bias or {})):
        for token in ids:
            if not 0 <= token < vocab_size:
                raise ValueError(f"sampling.{name}: token id {token} is not in the vocabulary; valid are 0 to {vocab_size - 1}")
    for token, bias in (params.logit_bias or {}).items():
        if not math.isfinite(bias):
            raise ValueError(f"sampling.logit_bias: the bias {bias} of token {token} must be a finite number; -100 or less bans a token")

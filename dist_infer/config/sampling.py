"""Sampling parameters, named as vLLM and OpenAI name them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from dist_infer.config.field import check_ranges, option

# What a parameter is when neither the request nor the model's generation_config.json gives it.
FALLBACK: dict[str, Any] = {
    "n": 1,
    "min_tokens": 0,
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "stop": [],
    "stop_token_ids": [],
    "ignore_eos": False,
    "skip_special_tokens": True,
}


@dataclass
class SamplingParams:
    """What a request asks of the sampler. None means: the model's default, else the fallback."""

    n: int | None = option(None, "outputs for each prompt", low=1, high=1024)
    max_tokens: int | None = option(None, "most tokens to produce; default: up to the model's length", low=1)
    min_tokens: int | None = option(None, "tokens before an end or stop may come", low=0, high=2**31 - 1)
    temperature: float | None = option(None, "0 is greedy", low=0)
    top_k: int | None = option(None, "keep the k most likely tokens; 0 or -1 keeps all", low=-1, high=2**31 - 1)
    top_p: float | None = option(None, "keep the most likely tokens up to this probability", above=0, high=1)
    min_p: float | None = option(None, "keep tokens at least this likely relative to the best", low=0, high=1)
    repetition_penalty: float | None = option(
        None, "divides (multiplies) positive (negative) logits of tokens seen in prompt or output", above=0
    )
    presence_penalty: float | None = option(None, "subtracted from logits of tokens in the output", low=-2, high=2)
    frequency_penalty: float | None = option(None, "subtracted once for each time a token is in the output", low=-2, high=2)
    logit_bias: dict[int, float] | None = option(None, "added to the logits of these token ids")
    stop: list[str] | None = option(None, "strings that end the output; they are cut off")
    stop_token_ids: list[int] | None = option(None, "token ids that end the output")
    ignore_eos: bool | None = option(None, "go on after the model's end token")
    logprobs: int | None = option(
        None, "raw log-probabilities (of the logits as the model gave them) of each token and of this many best", low=0, high=64
    )
    seed: int | None = option(None, "seed of the noise; default: drawn for each request", low=0, high=2**63 - 1)
    skip_special_tokens: bool | None = option(None, "leave special tokens out of the text")

    def __post_init__(self) -> None:
        """Raises ValueError with the parameter, its value and what would be valid."""
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        check_ranges(self, "sampling")
        if self.stop and any(not text for text in self.stop):
            raise ValueError("sampling.stop: an empty string would stop at once; give non-empty strings")
        if self.min_tokens is not None and self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"sampling.min_tokens={self.min_tokens}: must be at most max_tokens={self.max_tokens}")

    def over(self, defaults: SamplingParams) -> SamplingParams:
        """These parameters, with `defaults` wherever they are silent; a default `min_tokens` gives way to `max_tokens`."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if self.max_tokens is not None and self.min_tokens is None and defaults.min_tokens is not None:
            given["min_tokens"] = min(defaults.min_tokens, self.max_tokens)
        return replace(defaults, **given)

    def resolved(self) -> SamplingParams:
        """These parameters with the fallbacks filled in; max_tokens, logprobs and seed may stay None."""
        return self.over(SamplingParams(**FALLBACK))

"""How a task wants text generated, in the engine's terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dist_infer.config.sampling import SamplingParams
from dist_infer.engine.blueprint import Blueprint

DEFAULT_TOKENS = 256  # what the harness's own models take where a task is silent
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one setting, the first that is given counts
SAME = ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens")
NEUTRAL = (None, 0, 1, [], {})  # values at which the settings we lack do nothing, such as num_beams=1


@dataclass(frozen=True)
class Generation:
    """Settings of the requests of a task.

    Attributes:
        params: For the sampler.
        max_tokens: Most tokens to produce.
        until: The text ends before the first of these.
    """

    params: SamplingParams
    max_tokens: int
    until: tuple[str, ...]

    @classmethod
    def of(cls, task: str, given: Mapping[str, Any], blueprint: Blueprint, max_length: int) -> Generation:
        """The settings of a task; the run's own `sampling` options go over them.

        Args:
            task: Its name.
            given: Its `generation_kwargs`; unless `do_sample` is true or a temperature is given, decoding is greedy.
            blueprint: Of the model.
            max_length: Longest sequence, in tokens.

        Raises:
            ValueError: A setting that the engine does not have, a value out of its range, or no room for a prompt.
        """
        try:
            made = cls._of(given, blueprint)
        except (TypeError, ValueError) as error:
            raise ValueError(f"task {task}: {error}") from None
        if made.max_tokens >= max_length:
            raise ValueError(
                f"task {task}: max_gen_toks={made.max_tokens} leaves no room for a prompt, as the longest sequence is {max_length} tokens: "
                f"give eval.gen_kwargs={{max_gen_toks: {max(max_length // 2, 1)}}}"
            )
        return made

    @classmethod
    def _of(cls, given: Mapping[str, Any], blueprint: Blueprint) -> Generation:
        tokenizer = blueprint.need_tokenizer("an evaluation")
        rest = dict(given)
        until = rest.pop("until", None)
        until = [until] if isinstance(until, str) else list(until or [])
        lengths = [rest.pop(name, None) for name in LENGTHS]
        do_sample, temperature = rest.pop("do_sample", None), rest.pop("temperature", None)
        if do_sample and temperature is None:
            temperature = 1.0
        known = {name: rest.pop(name) for name in SAME if name in rest}
        known["min_tokens"] = rest.pop("min_new_tokens", known.get("min_tokens"))
        for name, value in rest.items():
            if value not in NEUTRAL:
                raise ValueError(f"generation setting {name}={value!r} is not supported; known are {', '.join((*LENGTHS[:1], *SAME))}")
        end = tokenizer.eos_token
        stops = dict.fromkeys(text for text in (*until, end) if text)
        # Special tokens give no text, so that a stop sequence which is one must be known by its id.
        special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        asked = SamplingParams(
            n=1,
            max_tokens=int(next((length for length in lengths if length is not None), DEFAULT_TOKENS)),
            temperature=0.0 if do_sample is False else float(temperature or 0.0),
            stop=list(stops),
            stop_token_ids=[special[text] for text in stops if text in special],
            **known,
        )
        # Each request gets a seed of its own; what is greedy has none, so that none is part of its key.
        params = replace(blueprint.params(blueprint.options.sampling.over(asked)), seed=None)
        assert params.max_tokens is not None
        return cls(params, params.max_tokens, tuple(params.stop or ()))

    def cut(self, text: str) -> str:
        """`text` up to where the first of `until` begins."""
        for stop in self.until:
            text = text.split(stop)[0]
        return text

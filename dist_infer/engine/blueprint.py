"""Everything known of a run before a rank is started or a weight read: the cheap checks, made first."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dist_infer.checkpoint.checkpoint import Checkpoint, open_checkpoint
from dist_infer.config.options import Options
from dist_infer.config.sampling import SamplingParams
from dist_infer.model.config import ModelConfig
from dist_infer.model.weights import describe
from dist_infer.sampling.parameters import GenerationDefaults, check, defaults_from_generation_config


@dataclass(frozen=True)
class Blueprint:
    """The model of a run, and how it is to be used.

    Attributes:
        options: What the user set.
        checkpoint: Where the weights come from; None when they are in memory.
        config: The architecture.
        dtype: Type of weights and KV cache.
        generation: What the model's generation_config.json says.
        max_model_len: Longest sequence.
        given_tokenizer: A tokenizer made by the caller.
    """

    options: Options
    checkpoint: Checkpoint | None
    config: ModelConfig
    dtype: torch.dtype
    generation: GenerationDefaults
    max_model_len: int
    given_tokenizer: Any = None

    @classmethod
    def of(cls, options: Options) -> Blueprint:
        """Find, read and check all that is cheap.

        Raises:
            FileNotFoundError: The checkpoint or its configuration is not there.
            ValueError: It is damaged, does not match its configuration, or an option is out of range.
        """
        options.check()
        if options.model.path is None:
            raise ValueError("model.path is not given: name a checkpoint directory, such as model.path=runs/step_50000")
        checkpoint = open_checkpoint(options.model.path, options.model.dialect, options.model.step, options.model.config)
        config = checkpoint.config(options.model.config)
        checkpoint.match(config)
        return cls.around(options, config, checkpoint)

    @classmethod
    def around(cls, options: Options, config: ModelConfig, checkpoint: Checkpoint | None = None, tokenizer: Any = None) -> Blueprint:
        """The blueprint of a model whose configuration is known."""
        longest = options.engine.max_model_len or config.longest
        if longest > config.longest:
            raise ValueError(f"engine.max_model_len={longest}: the model takes at most {config.longest} tokens")
        file = checkpoint.generation_config() if checkpoint is not None else None
        generation = defaults_from_generation_config(json.loads(file.read_text(encoding="utf-8")) if file is not None else {})
        name = options.model.dtype
        if name == "auto":
            name = checkpoint.dtype(config) if checkpoint is not None else config.dtype or "float32"
        blueprint = cls(options, checkpoint, config, getattr(torch, name), generation, longest, tokenizer)
        blueprint.params(options.sampling)
        return blueprint

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The model's end tokens."""
        return self.generation.eos_ids or self.config.eos_token_ids

    @cached_property
    def parameters(self) -> int:
        """Elements of all weights."""
        return sum(weight.elements for weight in describe(self.config))

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None when there is none.

        Raises:
            FileNotFoundError: `model.tokenizer` names none.
            ValueError: It cannot be read.
        """
        if self.given_tokenizer is not None:
            return self.given_tokenizer
        named = self.options.model.tokenizer
        if named == "none":
            return None
        place = named or (self.checkpoint.tokenizer_directory() if self.checkpoint is not None else None)
        if place is None:
            return None
        if named is not None and Path(named).is_dir() and not any(Path(named).glob("tokenizer*")):
            raise FileNotFoundError(
                f"model.tokenizer={named}: the directory holds no tokenizer.json, tokenizer_config.json or tokenizer.model"
            )
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(place), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"model.tokenizer={place}: no tokenizer can be read there ({reason})") from None

    def need_tokenizer(self, purpose: str) -> Any:
        """The tokenizer.

        Raises:
            ValueError: There is none; the message says what `purpose` needs it for.
        """
        if self.tokenizer is None:
            where = self.checkpoint.path if self.checkpoint is not None else "the model"
            raise ValueError(f"no tokenizer beside {where}, and {purpose} needs one: give model.tokenizer=DIRECTORY, or token ids")
        return self.tokenizer

    def params(self, given: SamplingParams) -> SamplingParams:
        """`given` over the run's sampling options over the model's defaults.

        Raises:
            ValueError: A token id outside the vocabulary, or stop strings without a tokenizer.
        """
        params = given.over(self.options.sampling).over(self.generation.params).resolved()
        check(params, self.config.vocab_size)
        if params.stop:
            self.need_tokenizer("sampling.stop")
        return params

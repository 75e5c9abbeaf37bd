"""Decode speed beside transformers' `generate`, in one run, with a check that the tokens are right.

Both sides run the model of `model.py` on CPU: bfloat16, greedy, prompts of random tokens, the same for both. A side's decode rate
is what it makes once every sequence has its first token, over the time that takes. Rounds alternate between the sides,
because only ratios taken close together mean anything on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from model import VOCABULARY, make_model, write_checkpoint
from torch import Tensor
from transformers import LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from dist_infer.config.options import read_options
from dist_infer.config.sampling import SamplingParams
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.engine import Delta
from dist_infer.engine.request import Result
from dist_infer.engine.session import Session

CHECKED = 8  # sequences of a batch whose tokens are compared with float32
CLEAR = 4.0  # a gap of this many times the bfloat16 error decides an argmax for sure


@dataclass
class Run:
    """One side's run of one batch.

    Attributes:
        tokens: [batch, new tokens].
        rate: Decode tokens/s.
        step_ms: Median milliseconds between two steps.
    """

    tokens: Tensor
    rate: float
    step_ms: float

    @classmethod
    def of(cls, tokens: Tensor, times: list[float], counts: list[int]) -> Run:
        """A run whose steps ended at `times`, with `counts` tokens made by then."""
        first = next(step for step, count in enumerate(counts) if count >= len(tokens))
        times, counts = times[first:], counts[first:]
        steps = [after - before for before, after in zip(times, times[1:], strict=False)]
        return cls(tokens, (counts[-1] - counts[0]) / (times[-1] - times[0]), 1e3 * statistics.median(steps))


class Clock(StoppingCriteria):
    """Stops nothing, and notes when each step of `generate` ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        """[batch] of False."""
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def run_transformers(model: LlamaForCausalLM, prompts: Tensor, new_tokens: int) -> Run:
    """`generate` with its defaults for a static batch: sdpa, a dynamic cache."""
    clock = Clock()
    output = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    assert isinstance(output, Tensor)
    batch = len(prompts)
    return Run.of(output[:, prompts.shape[1] :], clock.times, [batch * (step + 1) for step in range(len(clock.times))])


class Ours:
    """A session of `dist_infer` on the checkpoint, made anew for each use so that idle ranks are never in the other side's way."""

    def __init__(self, checkpoint: Path, tp: int, batch_tokens: int) -> None:
        self.overrides = [
            f"model.path={checkpoint}",
            "model.tokenizer=none",
            "device=cpu",
            f"parallel.tp={tp}",
            "engine.kv_cache_gib=0.5",
            f"engine.max_batch_tokens={batch_tokens}",
        ]

    def run(self, prompts: Tensor, new_tokens: int) -> Run:
        """Continue all prompts as one batch."""
        options = read_options(self.overrides)
        session = Session(options, lambda: Blueprint.of(options), scripted=True)
        try:
            return self._run(session, prompts, new_tokens)
        finally:
            session.close()

    def _run(self, session: Session, prompts: Tensor, new_tokens: int) -> Run:
        from dist_infer.engine.intake import Intake

        intake, params = Intake(session.blueprint), SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        requests = [intake.request(prompt, params, index=index) for index, prompt in enumerate(prompts.tolist())]
        times: list[float] = []
        counts: list[int] = []
        outputs: dict[int, list[int]] = {}

        def sink(deltas: list[Delta], results: list[Result]) -> None:
            times.append(time.perf_counter())
            counts.append((counts[-1] if counts else 0) + len(deltas))
            outputs.update((result.index, result.outputs[0].token_ids) for result in results)

        session.run(requests, sink)
        return Run.of(torch.tensor([outputs[index] for index in range(len(prompts))]), times, counts)


@dataclass
class Check:
    """How tokens compare with float32.

    Attributes:
        tokens: Tokens looked at.
        clear: Those whose best logit leads by more than `CLEAR` times the error of bfloat16.
        wrong: Clear ones that were not chosen.
        agree: Tokens that are float32's argmax, clear or not.
    """

    tokens: int
    clear: int
    wrong: int
    agree: int

"""`dist_infer` as a side: one session, kept."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from serving import Command, generated, serve

from dist_infer.config.options import read_options
from dist_infer.config.sampling import SamplingParams
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.engine import Delta
from dist_infer.engine.intake import Intake
from dist_infer.engine.request import Result
from dist_infer.engine.session import Session


class Ours:
    """A session of `dist_infer` with the options `overrides`."""

    def __init__(self, overrides: list[str]) -> None:
        options = read_options(overrides)
        self.session = Session(options, lambda: Blueprint.of(options), scripted=True)
        self.intake = Intake(self.session.blueprint)

    def generate(
        self, prompts: list[list[int]], new_tokens: list[int], temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> dict[str, Any]:
        """Continue every prompt by as many tokens as `new_tokens` says."""
        requests = [
            self.intake.request(
                prompt,
                SamplingParams(max_tokens=count, temperature=temperature, top_p=top_p, ignore_eos=True, seed=seed + index),
                index=index,
            )
            for index, (prompt, count) in enumerate(zip(prompts, new_tokens, strict=True))
        ]
        times: list[float] = []
        counts: list[int] = []
        tokens: list[list[int]] = [[] for _ in prompts]
        waiting, first, made = set(range(len(prompts))), 0.0, 0

        def sink(deltas: list[Delta], results: list[Result]) -> None:
            nonlocal first, made
            now = time.perf_counter()
            made += len(deltas)
            times.append(now)
            counts.append(made)
            if waiting:
                waiting.difference_update(delta.request.index for delta in deltas)
                first = now
            for result in results:
                assert result.error is None, result.error
                tokens[result.index] = result.outputs[0].token_ids

        began = time.perf_counter()
        self.session.run(requests, sink)
        return generated(began, times, counts, first, tokens)

    def score(self, contexts: list[list[int]], continuations: list[list[int]]) -> dict[str, Any]:
        """Score every continuation after its context: seconds, and the log-probabilities."""
        pairs = zip(contexts, continuations, strict=True)
        requests = [self.intake.score(context, continuation, index=index) for index, (context, continuation) in enumerate(pairs)]
        found = [0.0] * len(requests)

        def sink(_: list[Delta], results: list[Result]) -> None:
            for result in results:
                assert result.score is not None, result.error
                found[result.index] = result.score.logprob

        began = time.perf_counter()
        self.session.run(requests, sink)
        return {"seconds": time.perf_counter() - began, "scores": found}

    def close(self) -> dict[str, Any]:
        """End the session."""
        self.session.close()
        return {}


def make() -> dict[str, Command]:
    """The session that the command line asks for."""
    ours = Ours(json.loads(sys.argv[1]))
    return {"generate": ours.generate, "score": ours.score, "close": ours.close}


if __name__ == "__main__":
    serve(make)

"""vLLM as a side; run by the Python that has it: `serve_vllm.py MODEL TP DEVICE MAX_BATCH_TOKENS`."""

from __future__ import annotations

import itertools
import os
import sys
import time
from typing import Any

from serving import Command, generated, serve

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


class Vllm:
    """vLLM's offline engine, driven step by step so that steps can be timed."""

    def __init__(self, model: str, tp: int, device: str, max_batch_tokens: int) -> None:
        from vllm import LLM  # pyright: ignore[reportMissingImports]

        share: dict[str, Any] = {"gpu_memory_utilization": 0.4} if device == "cuda" else {}
        llm = LLM(
            model, skip_tokenizer_init=True, dtype="bfloat16", tensor_parallel_size=tp, max_num_batched_tokens=max_batch_tokens, **share
        )
        self.engine = llm.llm_engine
        self.numbers = itertools.count()

    def generate(
        self, prompts: list[list[int]], new_tokens: list[int], temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> dict[str, Any]:
        """Continue every prompt by as many tokens as `new_tokens` says."""
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

        began = time.perf_counter()
        places: dict[str, int] = {}
        for index, (prompt, count) in enumerate(zip(prompts, new_tokens, strict=True)):
            params = SamplingParams(max_tokens=count, temperature=temperature, top_p=top_p, ignore_eos=True, detokenize=False)
            params.output_kind = RequestOutputKind.DELTA
            if temperature:
                params.seed = seed + index
            name = str(next(self.numbers))
            self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
            places[name] = index
        times: list[float] = []
        counts: list[int] = []
        tokens: list[list[int]] = [[] for _ in prompts]
        first = 0.0
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            now = time.perf_counter()
            begun = all(tokens)
            for output in outputs:
                tokens[places[output.request_id]] += output.outputs[0].token_ids
            times.append(now)
            counts.append(sum(map(len, tokens)))
            if not begun:
                first = now
        return generated(began, times, counts, first, tokens)


def make() -> dict[str, Command]:
    """The engine that the command line asks for."""
    return {"generate": Vllm(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])).generate}


if __name__ == "__main__":
    serve(make)

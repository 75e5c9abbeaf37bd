"""transformers as a side, in bfloat16, and as the judge of everybody's tokens, in float32: `serve_transformers.py MODEL DEVICE`."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from serving import Command, generated, serve
from torch import Tensor
from transformers import LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

CLEAR = 4.0  # float32's best token is clear when it leads by this many times the error of bfloat16 in that row
LIKELY = 16  # tokens of a row that might come first


class Clock(StoppingCriteria):
    """Stops nothing, and notes when each step of `generate` ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Any:
        """[batch] of False."""
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Transformers:
    """A transformers model with sdpa attention."""

    def __init__(self, path: str, device: str) -> None:
        self.path, self.device = path, device
        self.model = self._load(torch.bfloat16)
        self.exact: Any = None

    def _load(self, dtype: torch.dtype) -> Any:
        model: Any = LlamaForCausalLM.from_pretrained(self.path, dtype=dtype, attn_implementation="sdpa")
        return model.to(self.device).eval()

    def generate(self, prompts: list[list[int]], new_tokens: list[int]) -> dict[str, Any]:
        """Continue prompts of one length, greedily, by the same number of tokens each: a static batch with a cache."""
        assert len(set(map(len, prompts))) == len(set(new_tokens)) == 1
        count, clock, given = new_tokens[0], Clock(), torch.tensor(prompts, device=self.device)
        began = time.perf_counter()
        output = self.model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        assert isinstance(output, Tensor)
        counts = [len(prompts) * (step + 1) for step in range(count)]
        return generated(began, clock.times, counts, clock.times[0], output[:, given.shape[1] :].tolist())

    @torch.no_grad()
    def check(self, prompts: list[list[int]], tokens: list[list[int]]) -> dict[str, Any]:
        """Compare tokens with float32's choice after each of their prefixes.

        The error of bfloat16 in a row is the largest that this model's bfloat16 logits have there among the row's `LIKELY` best tokens.

        Returns:
            "tokens" looked at; "clear" ones, where float32 leads by more than `CLEAR` times that error; clear ones that are "wrong"; and
            those that "agree" with float32, clear or not. "bf16" are those where transformers' own choice in bfloat16 agrees.
        """
        self.exact = self.exact or self._load(torch.float32)
        total: dict[str, int] = dict.fromkeys(("tokens", "clear", "wrong", "agree", "bf16"), 0)
        for prompt, made in zip(prompts, tokens, strict=True):
            inputs = torch.tensor([prompt + made[:-1]], device=self.device)
            chosen = torch.tensor(made, device=self.device)
            wanted = self.exact(inputs, logits_to_keep=len(made)).logits[0]
            rounded = self.model(inputs, logits_to_keep=len(made)).logits[0].float()
            error = (rounded - wanted).abs().gather(1, wanted.topk(LIKELY).indices).amax(1)
            best = wanted.topk(2)
            clear = best.values[:, 0] - best.values[:, 1] > CLEAR * error
            right = best.indices[:, 0] == chosen
            found = {
                "tokens": len(made),
                "clear": int(clear.sum()),
                "wrong": int((clear & ~right).sum()),
                "agree": int(right.sum()),
                "bf16": int((rounded.argmax(1) == best.indices[:, 0]).sum()),
            }
            total = {name: total[name] + found[name] for name in total}
        return total


def make() -> dict[str, Command]:
    """The model that the command line names."""
    side = Transformers(*sys.argv[1:])
    return {"generate": side.generate, "check": side.check}


if __name__ == "__main__":
    serve(make)

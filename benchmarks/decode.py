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
from itertools import pairwise
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
from dist_infer.engine.intake import Intake
from dist_infer.engine.request import Result
from dist_infer.engine.session import Session

CHECKED = 8  # sequences of a batch whose tokens are compared with float32
CLEAR = 6.0  # two logits this many times the root-mean-square error of bfloat16 apart are in the right order


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
        steps = [after - before for before, after in pairwise(times)]
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
        clear: Those where float32's best logit leads by more than `CLEAR` times the error of bfloat16.
        wrong: Clear ones that are not the best.
        agree: Tokens that are the best in float32, clear or not.
    """

    tokens: int
    clear: int
    wrong: int
    agree: int


@torch.no_grad()
def check(model: LlamaForCausalLM, exact: LlamaForCausalLM, prompts: Tensor, tokens: Tensor) -> Check:
    """Compare `tokens` with float32's choice after each of their prefixes; the error is that of `model`, transformers in bfloat16."""
    prompts, tokens = prompts[:CHECKED], tokens[:CHECKED]
    inputs = torch.cat((prompts, tokens[:, :-1]), dim=1)
    wanted = exact(inputs, logits_to_keep=tokens.shape[1]).logits
    error = (model(inputs, logits_to_keep=tokens.shape[1]).logits.float() - wanted).square().mean().sqrt()
    best = wanted.topk(2, dim=-1)
    clear = best.values[..., 0] - best.values[..., 1] > CLEAR * error
    right = best.indices[..., 0] == tokens
    return Check(tokens.numel(), int(clear.sum()), int((clear & ~right).sum()), int(right.sum()))


def compare(batches: list[int], tps: list[int], rounds: int, prompt_tokens: int, new_tokens: int) -> list[dict[str, object]]:
    """Run every batch size on every side, `rounds` times in alternation; one record for each of our sides and batch sizes."""
    model = make_model()
    exact = LlamaForCausalLM(model.config).float().eval()
    exact.load_state_dict(model.state_dict())
    records: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(model, Path(directory))
        sides: dict[str, Callable[[Tensor, int], Run]] = {"transformers": lambda *given: run_transformers(model, *given)}
        for tp in tps:
            sides[f"tp={tp}"] = Ours(Path(directory), tp, max(batches) * prompt_tokens).run
        for batch in batches:
            runs: dict[str, list[Run]] = {side: [] for side in sides}
            generator = torch.Generator().manual_seed(batch)
            prompts = torch.randint(3, VOCABULARY, (rounds, batch, prompt_tokens), generator=generator)
            for number in range(rounds):
                for side, run in sides.items():
                    runs[side].append(run(prompts[number], new_tokens))
            for side in sides:
                checked = check(model, exact, prompts[-1], runs[side][-1].tokens)
                rates, steps = [run.rate for run in runs[side]], [run.step_ms for run in runs[side]]
                ratios = [ours.rate / theirs.rate for ours, theirs in zip(runs[side], runs["transformers"], strict=True)]
                step_ratios = [theirs.step_ms / ours.step_ms for ours, theirs in zip(runs[side], runs["transformers"], strict=True)]
                record = {
                    "side": side,
                    "batch": batch,
                    "rate": statistics.median(rates),
                    "ratio": statistics.median(ratios),
                    "step_ms": statistics.median(steps),
                    "step_ratio": statistics.median(step_ratios),
                    "rates": rates,
                    "steps_ms": steps,
                    "check": asdict(checked),
                }
                records.append(record)
                speeds = f"{record['rate']:>10,.1f} {record['ratio']:>7.2f} {record['step_ms']:>9.2f} {record['step_ratio']:>7.2f}"
                truth = f"{checked.agree}/{checked.tokens} agree, {checked.wrong} of {checked.clear} clear ones wrong"
                print(f"{side:>12} {batch:>6} {speeds}   {truth}", flush=True)
    return records


def main() -> None:
    """Read the command line, run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="sequences at once")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2], help="our tp sizes, each a side of its own")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens made for each sequence")
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{versions}, {torch.get_num_threads()} threads, medians of {args.rounds} rounds")
    print(f"{'side':>12} {'batch':>6} {'tokens/s':>10} {'ratio':>7} {'step ms':>9} {'ratio':>7}   tokens against float32", flush=True)
    records = compare(args.batches, args.tp, args.rounds, args.prompt_tokens, args.new_tokens)
    if args.json is not None:
        about = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
            "machine": platform.processor() or platform.machine(),
            "options": {key: value for key, value in vars(args).items() if key != "json"},
        }
        args.json.write_text(json.dumps({**about, "records": records}, indent=2) + "\n")
    wrong = sum(int(record["check"]["wrong"]) for record in records)  # type: ignore[index]
    if wrong:
        raise SystemExit(f"{wrong} tokens are not float32's although it is sure of them")


if __name__ == "__main__":
    main()

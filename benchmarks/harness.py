"""A multiple-choice task of lm-evaluation-harness beside the harness's own `hf` model, in one run; choices are checked against float32.

Both sides run a random model of 135 million weights (the shape of SmolLM) on CPU in bfloat16, through the harness's `simple_evaluate`.
The choices of a question share its long context. Loading is not timed. Every round asks new questions, so that nothing is left over
from the one before, and rounds alternate between the sides, because only ratios taken close together mean anything on a shared machine.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import torch
import transformers
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from model import model_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from dist_infer.config.eval import EvalOptions
from dist_infer.config.options import read_options
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.intake import Intake
from dist_infer.engine.request import Request, Result
from dist_infer.engine.session import Session
from dist_infer.evaluation.harness import HarnessModel, evaluate
from dist_infer.evaluation.quiet import quiet
from dist_infer.evaluation.tasks import Tasks

VOCABULARY = model_config("135M").vocab_size
TASK = "choices"
CHECKED = 10  # questions of the last round whose choices are compared with float32
CLEAR = 4.0  # a choice that leads by this many times the largest error of hf in bfloat16 in that question must be everybody's

Scores = list[list[float]]  # of each question, of each choice


def write_model(directory: Path, layers: int) -> None:
    """Save a random model, and a tokenizer for which every word is a token."""
    torch.manual_seed(0)
    config = model_config("135M", num_hidden_layers=layers, bos_token_id=0, eos_token_id=0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    words = Tokenizer(models.WordLevel({"<end>": 0} | {f"w{number}": number for number in range(1, VOCABULARY)}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<end>", eos_token="<end>").save_pretrained(directory)


def make_tasks(manager: TaskManager, questions: int, context: int, choice: int, seed: int) -> Tasks:
    """A task of random questions of `context` tokens with four choices of `choice` tokens."""
    rng = random.Random(seed)

    def words(count: int) -> str:
        return " ".join(f"w{rng.randrange(1, VOCABULARY)}" for _ in range(count))

    rows = [{"question": words(context), "choices": [words(choice) for _ in range(4)], "right": 0} for _ in range(questions)]
    config = {
        "task": TASK,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "right",
        "metadata": {"version": 0},
    }
    with quiet(logging.ERROR):
        tasks = manager.load([config])["tasks"]
    return Tasks(list(tasks.values()), dict(tasks), manager)


def run_hf(path: Path, batch_size: int = 1, dtype: str = "bfloat16", limit: int | None = None) -> Callable[[Tasks], tuple[float, Scores]]:
    """The harness's own model, loaded once."""
    make: Any = HFLM  # its arguments are hidden from type checkers by a registry
    model = make(pretrained=str(path), dtype=dtype, device="cpu", batch_size=batch_size)

    def run(tasks: Tasks) -> tuple[float, Scores]:
        began = time.perf_counter()
        with quiet(), contextlib.redirect_stderr(io.StringIO()):  # it draws bars
            results: Any = simple_evaluate(model, tasks=tasks.chosen, task_manager=tasks.manager, bootstrap_iters=0, limit=limit)
        return time.perf_counter() - began, scores(results)

    return run


def run_ours(path: Path, overrides: list[str]) -> Callable[[Tasks], tuple[float, Scores]]:
    """`dist_infer`, its ranks started anew for each round, so that they never wait in the other side's way."""

    def run(tasks: Tasks) -> tuple[float, Scores]:
        options = read_options([f"model.path={path}", "device=cpu", "engine.kv_cache_gib=0.5", *overrides])
        session = Session(options, lambda: Blueprint.of(options), scripted=True)
        assert session.engine is not None

        def answers(requests: list[Request]) -> list[Result]:
            found: list[Result] = []
            session.run(requests, lambda _, results: found.extend(results))
            return sorted(found, key=lambda result: result.index)

        model = HarnessModel(Intake(session.blueprint), answers, session.engine.max_model_len)
        try:
            began = time.perf_counter()
            results = evaluate(EvalOptions(tasks=[TASK], bootstrap_iters=0), model, tasks)
            return time.perf_counter() - began, scores(results)
        finally:
            session.close()

    return run


def scores(results: Any) -> Scores:
    """The score of each choice."""
    return [[answer[0][0] for answer in sample["resps"]] for sample in results["samples"][TASK]]


def error(found: Scores, exact: Scores) -> float:
    """How far the scores of the questions in `exact` are from these (root-mean-square)."""
    pairs = [(a, b) for mine, other in zip(found, exact, strict=False) for a, b in zip(mine, other, strict=True)]
    return math.sqrt(sum((a - b) ** 2 for a, b in pairs) / len(pairs))


def compare(found: Scores, exact: Scores, rounded: Scores) -> tuple[int, int, int]:
    """Questions of `exact` answered as there, those that are clear given hf's scores `rounded`, and clear ones answered otherwise."""
    alike = clear = wrong = 0
    for mine, other, theirs in zip(found, exact, rounded, strict=False):
        best, second = sorted(other, reverse=True)[:2]
        same = mine.index(max(mine)) == other.index(best)
        sure = best - second > CLEAR * max(abs(a - b) for a, b in zip(theirs, other, strict=True))
        alike += same
        clear += sure
        wrong += sure and not same
    return alike, clear, wrong


def main() -> None:
    """Read the command line, run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--context", type=int, default=180, help="tokens that the choices of a question share")
    parser.add_argument("--choice", type=int, default=8, help="tokens of a choice")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8], help="of hf, each a side of its own; its default is 1")
    parser.add_argument("--tp", type=int, nargs="+", default=[1], help="our tp sizes, each a side of its own")
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    versions = f"lm_eval {lm_eval.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{versions}, {torch.get_num_threads()} threads, medians of {args.rounds} rounds")
    manager = TaskManager(include_defaults=False)
    tasks = make_tasks(manager, 2, args.context, args.choice, seed=-1)
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory), args.layers)
        sides = {f"hf batch_size={size}": run_hf(Path(directory), size) for size in args.batch_sizes}
        sides |= {f"dist_infer tp={tp}": run_ours(Path(directory), [f"parallel.tp={tp}"]) for tp in args.tp}
        reference = next(iter(sides))
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        last: dict[str, Scores] = {}
        for run in sides.values():  # warms up
            run(tasks)
        for number in range(args.rounds):
            tasks = make_tasks(manager, args.questions, args.context, args.choice, seed=number)
            for side, run in sides.items():
                took, last[side] = run(tasks)
                seconds[side].append(took)
        exact = run_hf(Path(directory), dtype="float32", limit=CHECKED)(tasks)[1]
    print(f"{'side':>18} {'seconds':>9} {'faster':>7}   choices against float32")
    records, failed = [], 0
    for side in sides:
        ratio = statistics.median(theirs / ours for theirs, ours in zip(seconds[reference], seconds[side], strict=True))
        alike, clear, wrong = compare(last[side], exact, last[reference])
        failed += wrong
        off = error(last[side], exact)
        records.append({"side": side, "seconds": seconds[side], "ratio": ratio, "alike": alike, "clear": clear, "wrong": wrong, "rms": off})
        truth = f"{alike}/{len(exact)} alike, {wrong} of {clear} clear ones wrong, scores off by {off:.3f}"
        print(f"{side:>18} {statistics.median(seconds[side]):>9.2f} {ratio:>7.2f}   {truth}")
    if args.json is not None:
        about = {"versions": versions, "threads": torch.get_num_threads(), "options": {k: v for k, v in vars(args).items() if k != "json"}}
        args.json.write_text(json.dumps({**about, "records": records}, indent=2) + "\n")
    if failed:
        raise SystemExit(f"{failed} choices are not float32's although they are clear")


if __name__ == "__main__":
    main()

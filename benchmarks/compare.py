"""Ours beside every peer that is installed, in one run: makes the models, measures every workload in alternation, and judges the figures.

Every side is a process of its own that is stopped while another is measured, and rounds alternate between sides, because only ratios
taken close together mean anything on a shared machine. Greedy tokens of every side are checked against float32 in the same run.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import programs
import torch
from figures import figures
from model import MODELS, model_config, write_model
from peers import KV_CACHE_TOKENS, Peers, find_vllm
from report import about, print_figures, print_workload, write
from side import Side, SideFailed
from workloads import QUICK, Maker, Sizes, Workload

RESULTS = Path(__file__).parent / "results"
CHECKED = 4  # sequences of a workload whose tokens are compared with float32
START_UP = "start-up"


class Comparison:
    """What a run has measured so far.

    Args:
        peers: Its sides.
        rounds: How often each workload is run by each side.
        skipped: Why sides are not there, by name; those that fail join them.
        hurried: Whether processes started to measure their start are kept.
    """

    def __init__(self, peers: Peers, rounds: int, skipped: dict[str, str], hurried: bool) -> None:
        self.peers, self.rounds, self.skipped, self.hurried = peers, rounds, skipped, hurried
        self.measured: dict[str, dict[str, list[float]]] = {}
        self.checks: dict[str, dict[str, dict[str, int]]] = {}

    def run(self, workload: Workload) -> None:
        """Measure a workload, round by round."""
        values: dict[str, list[float]] = {}
        last: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
        for name in dict.fromkeys(turn.side for turn in workload.turns(random.Random(0))):
            self._side(name)  # whatever has to be started is, before the first round
        for number in range(1 if workload.once else self.rounds * workload.repeats):
            turns = workload.turns(random.Random(f"{workload.name} {number}"))
            turned = number % len(turns)
            for turn in turns[turned:] + turns[:turned]:
                answer = self._ask(turn.side, turn.command)
                if answer is not None:
                    last[turn.label] = turn.command, answer
                    for label, value in turn.values(answer).items():
                        values.setdefault(label, []).append(value)
        first_turns = [turn.label for turn in workload.turns(random.Random(0))]
        order = sorted(values, key=lambda label: first_turns.index(label) if label in first_turns else len(first_turns))
        self.measured[workload.name] = {label: values[label] for label in order}
        if workload.checked:
            self.checks[workload.name] = {label: found for label in order if (found := self._check(*last[label])) is not None}
        checks = self.checks.get(workload.name, {})
        print_workload(workload.name, workload.unit, self.measured[workload.name], checks, workload.more_is_better)

    def start_up(self, sides: list[str]) -> None:
        """From the start of a process to its first token: each round anew, but for vLLM, whose processes are then kept."""
        values: dict[str, list[float]] = {}
        for number in range(self.rounds):
            for name in sides:
                kept = self.hurried or name.startswith("vLLM")
                if name in self.skipped or (kept and number):
                    continue
                side = None
                try:
                    if kept:
                        running = self._side(name)
                        if running is not None:
                            values[name] = [running.first_token_s]
                        continue
                    side = self.peers.new(name)
                    side.start()
                    values.setdefault(name, []).append(side.first_token_s)
                except SideFailed as error:
                    self._drop(name, error)
                finally:
                    if side is not None:
                        side.close()
        self.measured[START_UP] = values
        print_workload(START_UP, "s to the first token", values, {}, more_is_better=False)

    def program(self, name: str, run: Callable[[], dict[str, list[float]]]) -> None:
        """Run a benchmark that is a program of its own."""
        try:
            self.measured[name] = run()
        except subprocess.CalledProcessError as error:
            self.skipped[name] = f"{Path(error.cmd[1]).name} left with status {error.returncode}"
            return
        print_workload(name, "s", self.measured[name], {}, more_is_better=False)

    def _ask(self, name: str, command: dict[str, Any]) -> dict[str, Any] | None:
        """The answer of a side; None from one that has failed."""
        side = self._side(name)
        try:
            return None if side is None else side.ask(**command)
        except SideFailed as error:
            self._drop(name, error)
            return None

    def _side(self, name: str) -> Side | None:
        """The side, running; None where it is not there, or has failed."""
        if name in self.skipped:
            return None
        try:
            return self.peers.side(name)
        except SideFailed as error:
            self._drop(name, error)
            return None

    def _drop(self, name: str, error: SideFailed) -> None:
        self.peers.let_go(name)
        self.skipped[name] = str(error)
        print(f"{name} failed: {error}", file=sys.stderr, flush=True)

    def _check(self, command: dict[str, Any], answer: dict[str, Any]) -> dict[str, int] | None:
        """How tokens compare with float32."""
        return self._ask("transformers", {"do": "check", "prompts": command["prompts"][:CHECKED], "tokens": answer["tokens"][:CHECKED]})


def compare(args: argparse.Namespace, directory: Path) -> int:
    """Measure what the command line asks for; how many of our tokens were wrong."""
    sizes = QUICK if args.quick else Sizes()
    config = model_config("tiny" if args.quick else args.model)
    model = directory / "model"
    parameter_bytes = write_model(config, model)
    read = parameter_bytes  # of a step
    if not config.tie_word_embeddings:
        read -= 2 * config.vocab_size * config.hidden_size  # a few rows of the embedding are read, and the whole head
    kv_heads, head_dim = config.num_key_value_heads or config.num_attention_heads, config.head_dim or 0
    kv_bytes = 2 * 2 * config.num_hidden_layers * kv_heads * head_dim
    vllm, found = find_vllm(args.vllm)
    versions = {"vLLM": found}
    ranks = torch.cuda.device_count() if args.device == "cuda" else 2
    tps = [tp for tp in (1, 2) if tp <= ranks]
    skipped = absent(config.num_attention_heads, ranks, None if vllm is not None else found)
    everyone = ["transformers", *(f"vLLM tp={tp}" for tp in tps)]
    ours = [f"ours tp={tp}" for tp in tps]
    maker = Maker(sizes, config.vocab_size, ours, [name for name in everyone if name not in skipped])
    wanted = [workload for workload in maker.all() if _asked(workload.name, args.only)]
    description = about(vars(args), versions)
    machine = f"{description['processor']}, {description['cores']} cores, {description['gpu'] or 'no GPU'}"
    print(f"{machine}; torch {torch.__version__}; vLLM: {found}")
    for name, why in skipped.items():
        print(f"{name} is skipped: {why}")
    fill = None if args.quick else maker.fill(KV_CACHE_TOKENS)
    peers = Peers(model, kv_bytes, args.device, vllm, directory, maker.first(), maker.warm(), fill)
    comparison = Comparison(peers, args.rounds, skipped, args.quick)
    prefills = [workload.name for workload in maker.all() if workload.name.startswith("prefill")]

    def save() -> list[Any]:
        judged = figures(comparison.measured, read, list(sizes.batches), prefills)
        write(args.json, description, comparison.measured, comparison.checks, judged, comparison.skipped)
        return judged

    try:
        if _asked(START_UP, args.only):
            comparison.start_up([*ours, *everyone])
        for number, workload in enumerate(wanted):
            comparison.run(workload)
            save()
            later = {turn.side for rest in wanted[number + 1 :] for turn in rest.turns(random.Random(0))}
            for name in {*ours, *everyone, *(turn.side for turn in workload.turns(random.Random(0)))} - later - {"transformers"}:
                comparison.peers.let_go(name)
    finally:
        comparison.peers.close()
    if args.device == "cpu":
        for name, run in {"choices": programs.choices, "load": programs.load}.items():
            if _asked(name, args.only):
                comparison.program(name, lambda run=run: run(args.rounds, args.quick))
    print_figures(save())
    print(f"\nall of it: {args.json}")
    return sum(found["wrong"] for checks in comparison.checks.values() for label, found in checks.items() if label.startswith("ours"))


def absent(heads: int, ranks: int, no_vllm: str | None) -> dict[str, str]:
    """Why some sides cannot take part."""
    skipped: dict[str, str] = {}
    if no_vllm is not None:
        skipped = {"vLLM tp=1": no_vllm, "vLLM tp=2": no_vllm}
    elif heads % 2:
        skipped["vLLM tp=2"] = f"it does not cut {heads} heads in two"
    if ranks < 2:
        skipped |= dict.fromkeys(("vLLM tp=2", "ours fsdp=2", "ours replicas=2"), "there is one GPU only")
    return skipped


def _asked(name: str, only: list[str]) -> bool:
    """Whether a workload is wanted: the first word of its name counts."""
    return not only or name.replace(",", " ").split()[0] in only


def main() -> None:
    """Read the command line, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = "start-up, decode, limit, mix, prefill, sampled, idle, scoring, curve, choices, load"
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help=f"workloads, with commas between: {names}")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each workload by each side; short ones are run twice as often")
    parser.add_argument("--model", choices=MODELS, default="303M")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vllm", help="the Python that has vLLM; default: VLLM_PYTHON of the environment")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and few tokens, to see that everything runs; figures mean nothing"
    )
    parser.add_argument("--json", type=Path, help="file for all figures; default: a new one in benchmarks/results")
    args = parser.parse_args()
    unknown = set(args.only) - set(names.split(", "))
    if unknown:
        parser.error(f"--only {','.join(sorted(unknown))}: no such workload; there are {names}")
    if args.quick:
        args.rounds = 1
    args.json = args.json or RESULTS / f"{datetime.now():%Y%m%d-%H%M%S}.json"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that sides, which may be stopped, are ended
    with tempfile.TemporaryDirectory(prefix="dist_infer-benchmark-") as directory:
        wrong = compare(args, Path(directory))
    if wrong:
        raise SystemExit(f"{wrong} tokens are not float32's although it is sure of them")


if __name__ == "__main__":
    main()

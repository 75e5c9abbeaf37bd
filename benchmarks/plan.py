"""What `dist-infer plan` says of this machine beside what is measured on it, in one run.

The 303M model of `model.py`, in bfloat16: decode steps at batch 1, 8 and 32 and prefill of 32 prompts on one rank and on tp=2, scoring
on fsdp=2, loading, the tokens the KV cache holds, and the bytes that a rank says in a decode step, counted at its communicator. The
plan is made anew before every measurement, by turns: what memory gives may double within seconds, so medians of both are compared, and
the ratios of single pairs shown beside.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import chain, pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from model import model_config, write_model
from torch import Tensor

from dist_infer.config.options import read_options
from dist_infer.config.sampling import SamplingParams
from dist_infer.distributed.mesh import MeshShape
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.engine import Delta
from dist_infer.engine.intake import Intake
from dist_infer.engine.request import Request, Result
from dist_infer.engine.session import Session
from dist_infer.model import huge_pages

PROMPT, OUTPUT = 128, 64  # tokens
SCORED = 4  # of a prompt that is scored
SEQUENCES = 32  # of prefill and scoring
DECODES = 3  # runs of a batch, some seconds
KV_GIB = 1.0
AT_HAND = 2 << 30  # bytes given back just before weights are read
REST_S = 15.0  # in which a hypervisor takes memory back that was given back
FIGURES = ("loading", "decode", "prefill", "scoring", "cache", "bytes")


class Row(NamedTuple):
    """One figure of one mesh."""

    mesh: str
    what: str
    pairs: tuple[tuple[float, float], ...]

    @property
    def predicted(self) -> float:
        """In the median."""
        return statistics.median(predicted for predicted, _ in self.pairs)

    @property
    def measured(self) -> float:
        """In the median."""
        return statistics.median(measured for _, measured in self.pairs)

    @property
    def ratio(self) -> float:
        """Of the medians."""
        return self.predicted / self.measured

    @property
    def spread(self) -> tuple[float, float]:
        """Ratios of single pairs: least and greatest."""
        ratios = [predicted / measured for predicted, measured in self.pairs]
        return min(ratios), max(ratios)

    def to_json(self) -> dict[str, Any]:
        """Every figure."""
        return {**self._asdict(), "predicted": self.predicted, "measured": self.measured, "ratio": self.ratio}


def overrides(path: Path, shape: MeshShape) -> list[str]:
    """Options of a run on this mesh."""
    return [
        f"model.path={path}",
        "model.tokenizer=none",
        "device=cpu",
        f"parallel.tp={shape.tp}",
        f"parallel.fsdp={shape.fsdp}",
        f"engine.kv_cache_gib={KV_GIB}",
        "engine.max_sequences=1024",
        f"engine.max_batch_tokens={SEQUENCES * PROMPT}",
        "engine.prefix_cache=false",
    ]


def forecast(given: list[str], sequences: int, output: int) -> dict[str, Any]:
    """What is said of the machine as it is now."""
    work = [f"workload.sequences={sequences}", f"workload.prompt_tokens={PROMPT}", f"workload.output_tokens={output}"]
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "dist_infer", "plan", *given, "parallel.replicas=1", *work, f"output={file.name}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        meshes = json.loads(Path(file.name).read_text())["meshes"]
    assert len(meshes) == 1 and "traffic" in meshes[0], meshes
    return meshes[0]


class Running:
    """A session on one mesh, and what is measured with it."""

    def __init__(self, path: Path, shape: MeshShape, say: Callable[[str], None] | None = None) -> None:
        self.overrides = overrides(path, shape)
        options = read_options(self.overrides)
        self.session = Session(options, lambda: Blueprint.of(options), scripted=True, say=say)
        self.intake = Intake(self.session.blueprint)
        self.generator = torch.Generator().manual_seed(0)

    def forecast(self, sequences: int, output: int) -> dict[str, Any]:
        """What is said of the machine as it is now."""
        return forecast(self.overrides, sequences, output)

    def decode(self, batch: int) -> float:
        """Seconds of a step, in the median."""
        params = SamplingParams(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True)
        times: list[float] = []

        def sink(deltas: list[Delta], _: list[Result]) -> None:
            if deltas:
                times.append(time.perf_counter())

        steps: list[float] = []
        for _ in range(DECODES):
            times.clear()
            self.session.run([self.intake.request(prompt, params, index=index) for index, prompt in enumerate(self.prompts(batch))], sink)
            steps += (after - before for before, after in pairwise(times))
        return statistics.median(steps)

    def prefill(self) -> float:
        """Tokens/s of reading prompts."""
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        return self._rate(lambda index, prompt: self.intake.request(prompt, params, index=index))

    def score(self) -> float:
        """Tokens/s of scoring the end of prompts."""
        return self._rate(lambda index, prompt: self.intake.score(prompt[:-SCORED], prompt[-SCORED:], index=index))

    def said(self) -> float:
        """Bytes that this rank says in a decode step of one sequence."""
        decoder: Any = self.session.runner.decoder
        decoder._native_blocks = lambda: None  # sums that compiled code makes pass the communicator by
        with counted(self.session.mesh.control) as sizes:
            self.decode(1)
        del decoder._native_blocks
        answers = [place for place, (kind, _) in enumerate(sizes) if kind == "gather"]  # a step ends with one
        last = sizes[answers[-2] + 1 : answers[-1] + 1]
        return sum(size for _, size in last)

    def prompts(self, count: int) -> list[list[int]]:
        """Random ones, new with each call."""
        return torch.randint(3, self.session.blueprint.config.vocab_size, (count, PROMPT), generator=self.generator).tolist()

    def _rate(self, make: Callable[[int, list[int]], Request]) -> float:
        rates = []
        for _ in range(3):
            requests = [make(index, prompt) for index, prompt in enumerate(self.prompts(SEQUENCES))]
            began = time.perf_counter()
            self.session.run(requests, lambda *_: None)
            rates.append(SEQUENCES * PROMPT / (time.perf_counter() - began))
        return statistics.median(rates)


@contextmanager
def counted(communicator: Any) -> Iterator[list[tuple[str, int]]]:
    """Each call that this rank makes of `communicator`, and the bytes it brings."""
    sizes: list[tuple[str, int]] = []

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(tensor: Tensor, *rest: Any) -> Any:
            sizes.append((name, tensor.nbytes))
            return call(tensor, *rest)

        return called

    names = ("all_reduce", "broadcast", "gather")
    for name in names:
        setattr(communicator, name, counting(name, getattr(communicator, name)))
    yield sizes
    for name in names:
        delattr(communicator, name)


def loading(path: Path, shape: MeshShape, at_hand: bool) -> float:
    """Seconds that the weights take to be in place, in memory that is at hand or that a hypervisor must give."""
    held = [huge_pages.zeros((AT_HAND if at_hand else 0,), torch.uint8).fill_(1)]
    running = Running(path, shape, lambda line: held.clear())  # the last words before weights are read
    running.session.close()
    return running.session.resident.read_seconds


def compare_loading(path: Path, shape: MeshShape, rounds: int) -> Iterator[Row]:
    """How long weights take, from the page cache; FSDP's are in small pages too, of which a machine may have more at hand."""
    pairs: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for at_hand in ((True, False) if shape.fsdp == 1 else (True,)) * rounds:
        time.sleep(0 if at_hand else REST_S)
        said = forecast(overrides(path, shape), 1, OUTPUT)
        time.sleep(0 if at_hand else REST_S)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # which has no memory yet
            measured = pool.submit(loading, path, shape, at_hand).result()
        pairs[at_hand].append((said["load_s"] + (0 if at_hand else said["fresh_s"]), measured))
    for at_hand, what in ((True, "loading, s"), (False, "loading into fresh memory, s")):
        if pairs[at_hand]:
            yield Row(_name(shape), what, tuple(pairs[at_hand]))


def compare(path: Path, shape: MeshShape, rounds: int, only: Collection[str]) -> Iterator[Row]:
    """All other figures of one mesh: those of `only` that can be had on it."""
    mesh = _name(shape)
    if not set(only) & {"cache", "bytes", *(("decode", "prefill") if shape.fsdp == 1 else ("scoring",))}:
        return
    running = Running(path, shape)
    try:
        if "decode" in only and shape.fsdp == 1:
            running.decode(1)  # the first step of all makes caches
            for batch in (1, 8, 32):
                pairs = [
                    (1e3 * seconds_of(running.forecast(batch, OUTPUT)["decode_step"]), 1e3 * running.decode(batch)) for _ in range(rounds)
                ]
                yield Row(mesh, f"decode step, batch {batch}, ms", tuple(pairs))
        if "prefill" in only and shape.fsdp == 1:
            running.prefill()
            pairs = [(running.forecast(SEQUENCES, 1)["prefill"], running.prefill()) for _ in range(rounds)]
            yield Row(mesh, f"prefill {SEQUENCES} x {PROMPT}, tokens/s", tuple(pairs))
        if "scoring" in only and shape.fsdp > 1:
            running.score()
            pairs = [(running.forecast(SEQUENCES, 0)["prefill"], running.score()) for _ in range(rounds)]
            yield Row(mesh, f"scoring {SEQUENCES} x {PROMPT}, tokens/s", tuple(pairs))
        if "cache" in only:
            assert running.session.engine is not None
            allocators = running.session.engine.scheduler.allocators
            held = sum(allocator.available for allocator in allocators) * 16
            yield Row(mesh, "tokens of KV cache", ((running.forecast(1, OUTPUT)["kv_tokens"], held),))
        if "bytes" in only and shape.tp > 1:
            said = sum(one["count"] * one["bytes"] for one in running.forecast(1, OUTPUT)["traffic"])
            yield Row(mesh, "bytes a rank says in a decode step", ((said, running.said()),))
    finally:
        running.session.close()


def seconds_of(step: dict[str, float]) -> float:
    """The sum of its parts."""
    return sum(step[part] for part in ("products", "attention", "reductions", "gathers", "host"))


def _name(shape: MeshShape) -> str:
    return f"fsdp={shape.fsdp} tp={shape.tp}"


def main() -> None:
    """Print predicted, measured and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of measuring the machine and then the model")
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=FIGURES, help="some of the figures")
    parser.add_argument("--checkpoint", type=Path, help="another model, or this one where it is written already")
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    rows: list[Row] = []
    print(f"{'mesh':>14} {'':>36} {'predicted':>12} {'measured':>12} {'ratio':>6}  single pairs", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        if args.checkpoint is None:
            write_model(model_config("303M"), Path(directory, "303M"))
        path = args.checkpoint or Path(directory, "303M", "dcp")
        shapes = (MeshShape(1, 1, 1), MeshShape(1, 1, 2), MeshShape(1, 2, 1))
        loads = [compare_loading(path, shape, args.rounds) for shape in shapes if "loading" in args.only]
        for row in chain(*loads, *(compare(path, shape, args.rounds, args.only) for shape in shapes)):
            rows.append(row)
            figures = f"{row.predicted:>12,.5g} {row.measured:>12,.5g} {row.ratio:>6.2f}"
            least, greatest = row.spread
            print(f"{row.mesh:>14} {row.what:>36} {figures}  {least:.2f}-{greatest:.2f}", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps([row.to_json() for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()

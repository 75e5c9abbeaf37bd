"""What `dist-infer plan` says of this machine beside what is measured on it, in one run.

The 303M model of `model.py`, in bfloat16. The plan is made anew before every case, as the machine may have other work: decode steps at
batch 1, 8 and 32 and prefill of 32 prompts on one rank and on tp=2, scoring on fsdp=2, loading, the tokens the KV cache holds, and
the bytes that a rank says in a decode step, counted at its communicator.
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

PROMPT, OUTPUT = 128, 64  # tokens
SCORED = 4  # of a prompt that is scored
SEQUENCES = 32  # of prefill and scoring
KV_GIB = 1.0
FIGURES = ("loading", "decode", "prefill", "scoring", "cache", "bytes")
# A hypervisor takes freed memory back within seconds. Before that it is filled several times faster than fresh memory is.
REST_S = 15.0


class Row(NamedTuple):
    """One figure of one mesh."""

    mesh: str
    what: str
    predicted: float
    measured: float


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

    def __init__(self, path: Path, shape: MeshShape) -> None:
        self.overrides = overrides(path, shape)
        options = read_options(self.overrides)
        self.session = Session(options, lambda: Blueprint.of(options), scripted=True)
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

        self.session.run([self.intake.request(prompt, params, index=index) for index, prompt in enumerate(self.prompts(batch))], sink)
        return statistics.median(after - before for before, after in pairwise(times))

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


def loading(path: Path, shape: MeshShape) -> float:
    """Seconds that the weights take to be in place."""
    running = Running(path, shape)
    running.session.close()
    return running.session.resident.read_seconds


def in_a_process_of_its_own(path: Path, shape: MeshShape) -> float:
    """`loading`, into memory that nobody had before."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(loading, path, shape).result()


def compare_loading(path: Path, shape: MeshShape, rounds: int) -> Row:
    """How long weights take, while nothing has yet been run that gives memory back."""
    loads = []
    for _ in range(rounds):
        time.sleep(REST_S)
        predicted = forecast(overrides(path, shape), 1, OUTPUT)["load_s"]
        time.sleep(REST_S)
        loads.append((predicted, in_a_process_of_its_own(path, shape)))
    return _median(_name(shape), "loading, s", loads)


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
                yield _median(mesh, f"decode step, batch {batch}, ms", pairs)
        if "prefill" in only and shape.fsdp == 1:
            running.prefill()
            pairs = [(running.forecast(SEQUENCES, 1)["prefill"], running.prefill()) for _ in range(rounds)]
            yield _median(mesh, f"prefill {SEQUENCES} x {PROMPT}, tokens/s", pairs)
        if "scoring" in only and shape.fsdp > 1:
            running.score()
            pairs = [(running.forecast(SEQUENCES, 0)["prefill"], running.score()) for _ in range(rounds)]
            yield _median(mesh, f"scoring {SEQUENCES} x {PROMPT}, tokens/s", pairs)
        if "cache" in only:
            assert running.session.engine is not None
            allocators = running.session.engine.scheduler.allocators
            held = sum(allocator.available for allocator in allocators) * 16
            yield Row(mesh, "tokens of KV cache", running.forecast(1, OUTPUT)["kv_tokens"], held)
        if "bytes" in only and shape.tp > 1:
            said = sum(one["count"] * one["bytes"] for one in running.forecast(1, OUTPUT)["traffic"])
            yield Row(mesh, "bytes a rank says in a decode step", said, running.said())
    finally:
        running.session.close()


def seconds_of(step: dict[str, float]) -> float:
    """The sum of its parts."""
    return sum(step[part] for part in ("products", "attention", "reductions", "gathers", "host"))


def _name(shape: MeshShape) -> str:
    return f"fsdp={shape.fsdp} tp={shape.tp}"


def _median(mesh: str, what: str, pairs: list[tuple[float, float]]) -> Row:
    """The pair whose ratio is in the middle."""
    return Row(mesh, what, *sorted(pairs, key=lambda pair: pair[0] / pair[1])[len(pairs) // 2])


def main() -> None:
    """Print predicted, measured and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of measuring the machine and then the model; the middle ratio is shown")
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=FIGURES, help="some of the figures")
    parser.add_argument("--checkpoint", type=Path, help="another model, or this one where it is written already")
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    rows: list[Row] = []
    print(f"{'mesh':>14} {'':>36} {'predicted':>12} {'measured':>12} {'ratio':>6}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        if args.checkpoint is None:
            write_model(model_config("303M"), Path(directory, "303M"))
        path = args.checkpoint or Path(directory, "303M", "dcp")
        shapes = (MeshShape(1, 1, 1), MeshShape(1, 1, 2), MeshShape(1, 2, 1))
        loads = (compare_loading(path, shape, args.rounds) for shape in shapes if "loading" in args.only)
        for row in chain(loads, *(compare(path, shape, args.rounds, args.only) for shape in shapes)):
            rows.append(row)
            figures = f"{row.predicted:>12,.5g} {row.measured:>12,.5g} {row.predicted / row.measured:>6.2f}"
            print(f"{row.mesh:>14} {row.what:>36} {figures}", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps([row._asdict() for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()

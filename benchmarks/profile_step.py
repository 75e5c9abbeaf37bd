"""Where the time of a decode step goes: a table of its parts, and a trace for chrome://tracing or Perfetto.

Parts are measured on rank 0 by wrapping what the package calls; time within another part is not counted twice. Waiting for others is in
"collectives". What wrapping costs (about a microsecond a call) is in the parts around. To be told apart, blocks run module by module, which
takes longer than the one compiled call that they are otherwise.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from model import MODELS, model_config, write_model

from dist_infer.config.options import read_options
from dist_infer.config.sampling import SamplingParams
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.engine import Delta
from dist_infer.engine.intake import Intake
from dist_infer.engine.request import Result
from dist_infer.engine.session import Session
from dist_infer.engine.step import Step
from dist_infer.model.attention import Attention
from dist_infer.model.batch import Batch
from dist_infer.model.layers import GatedMLP, LayerNorm, Linear, RMSNorm
from dist_infer.sampling.sampler import decide, resolve
from dist_infer.sampling.summary import summarize

# Part of the step that a kernel belongs to, by a word of its name.
KERNELS = {"attention": "attention", "rotate": "rotation and cache", "norm": "norms", "silu": "activation", "multiply": "products"}
REST = "the leader's Python"


class Recorder:
    """Seconds and calls of every part, each without the parts inside it.

    Attributes:
        tracing: Whether parts are shown to torch's profiler.
    """

    def __init__(self) -> None:
        self.tracing = False
        self.reset()

    def reset(self) -> None:
        """Forget what was measured."""
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._inside = [0.0]  # for each part that is open, seconds of the parts in it

    def wrap(self, part: str, function: Callable[..., Any], name: str = "") -> Callable[..., Any]:
        """`function`, as a piece of `part`."""

        @functools.wraps(function)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            began = time.perf_counter()
            try:
                with torch.profiler.record_function(f"{part}: {name or function.__name__}") if self.tracing else nullcontext():
                    return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - began
                self.seconds[part] += took - self._inside.pop()
                self.calls[part] += 1
                self._inside[-1] += took

        return recorded


class RecordedKernels:
    """Compiled kernels whose calls are recorded."""

    def __init__(self, kernels: Any, recorder: Recorder) -> None:
        self._kernels, self._recorder = kernels, recorder

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._kernels, name)
        if callable(found):
            part = next((part for word, part in KERNELS.items() if word in name), "other kernels")
            found = self._recorder.wrap(part, found, name)
        setattr(self, name, found)
        return found


def record(session: Session, recorder: Recorder) -> None:
    """Wrap what a step of `session` calls."""
    decoder: Any = session.runner.decoder
    decoder._native_blocks = lambda: None
    engine: Any = session.engine
    kernels = next((module.kernels for module in decoder.modules() if getattr(module, "kernels", None) is not None), None)
    if kernels is not None:
        decoder.use(RecordedKernels(kernels, recorder))
    for module in decoder.modules():
        if isinstance(module, Linear):
            module.product = recorder.wrap("products", module.product, f"{module.inputs} to {module.outputs}")
        elif isinstance(module, RMSNorm | LayerNorm):
            module.after = recorder.wrap("norms", module.after)
        elif isinstance(module, Attention):
            module.forward = recorder.wrap("around attention", module.forward)
        elif isinstance(module, GatedMLP):
            module.forward = recorder.wrap("activation", module.forward)
    decoder.forward = recorder.wrap("around layers", decoder.forward)
    for communicator in {id(found): found for found in (session.mesh.tp, session.mesh.control)}.values():
        for name in ("all_reduce", "broadcast", "gather"):
            setattr(communicator, name, recorder.wrap("collectives", getattr(communicator, name)))
    for function in (summarize, decide, resolve):
        _replace(function, recorder.wrap("sampling", function))
    runner: Any = session.runner
    runner.execute = recorder.wrap("the rank's tables", runner.execute)
    engine.scheduler.schedule = recorder.wrap("schedule", engine.scheduler.schedule)
    engine.scheduler.commit = recorder.wrap("schedule", engine.scheduler.commit)
    Step.encode = recorder.wrap("encode", Step.encode)
    of = Batch.of.__func__  # type: ignore[attr-defined]
    Batch.of = classmethod(recorder.wrap("batch and plan", of))  # type: ignore[assignment, method-assign]


def _replace(function: Callable[..., Any], recorded: Callable[..., Any]) -> None:
    """Put `recorded` wherever a module of the package knows `function`."""
    for module in [module for name, module in sys.modules.items() if name.startswith("dist_infer.")]:
        for name, value in list(vars(module).items()):
            if value is function:
                setattr(module, name, recorded)


class Window:
    """The steps in which every sequence makes a token; a sink of `Session.run`.

    Args:
        batch: Sequences.
        steps: How many steps to take in.
        begin, end: Called around them.
    """

    def __init__(self, batch: int, steps: int, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self.waiting, self.batch, self.steps, self.begin, self.end = set(range(batch)), batch, steps, begin, end
        self.times: list[float] = []

    def __call__(self, deltas: list[Delta], results: list[Result]) -> None:
        """Count a step."""
        if self.waiting:
            self.waiting.difference_update(delta.request.index for delta in deltas)
            if self.waiting:
                return
            self.begin()
        if len(self.times) <= self.steps:
            self.times.append(time.perf_counter())
            if len(self.times) == self.steps + 1:
                self.end()


def profile(session: Session, args: argparse.Namespace) -> None:
    """Print the table and write the trace."""
    recorder, intake = Recorder(), Intake(session.blueprint)
    record(session, recorder)
    rng = random.Random(0)
    vocabulary = session.blueprint.config.vocab_size

    def run(steps: int, begin: Callable[[], None], end: Callable[[], None]) -> list[float]:
        window = Window(args.batch, steps, begin, end)
        params = SamplingParams(max_tokens=steps + 8, temperature=args.temperature, top_p=args.top_p, seed=0, ignore_eos=True)
        prompts = [[rng.randrange(3, vocabulary) for _ in range(args.context)] for _ in range(args.batch)]
        session.run([intake.request(prompt, params, index=index) for index, prompt in enumerate(prompts)], window)
        return window.times

    run(4, lambda: None, lambda: None)  # warms up
    found: list[tuple[str, float, int]] = []
    times = run(
        args.steps, recorder.reset, lambda: found.extend((part, took, recorder.calls[part]) for part, took in recorder.seconds.items())
    )
    wall = times[-1] - times[0]
    found.append((REST, wall - sum(took for _, took, _ in found), 0))
    print(f"batch {args.batch}, context {args.context}, tp={args.tp}: {1e3 * wall / args.steps:.2f} ms a step, mean of {args.steps}")
    print(f"{'part':>22} {'ms':>8} {'%':>6} {'calls':>7}")
    for part, took, calls in sorted(found, key=lambda line: -line[1]):
        print(f"{part:>22} {1e3 * took / args.steps:>8.3f} {100 * took / wall:>6.1f} {calls / args.steps:>7.1f}")

    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    recorder.tracing = True
    run(args.traced, profiler.start, profiler.stop)
    args.trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(args.trace))
    print(f"trace of {args.traced} steps: {args.trace}")


def main() -> None:
    """Read the command line, make the model and profile it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="303M")
    parser.add_argument("--path", help="a checkpoint, instead of random weights")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=40, help="steps of the table")
    parser.add_argument("--traced", type=int, default=4, help="steps of the trace")
    parser.add_argument("--trace", type=Path, default=Path(__file__).parent / "results" / "trace.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dist_infer-benchmark-") as directory:
        path = args.path
        if path is None:
            write_model(model_config(args.model), Path(directory))
            path = str(Path(directory) / "dcp")
        overrides = ["model.tokenizer=none", f"device={args.device}", f"parallel.tp={args.tp}", "engine.kv_cache_gib=2"]
        options = read_options([f"model.path={path}", *overrides, "engine.max_batch_tokens=4096"])
        session = Session(options, lambda: Blueprint.of(options), scripted=True)
        try:
            profile(session, args)
        finally:
            session.close()


if __name__ == "__main__":
    main()

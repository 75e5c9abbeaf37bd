"""Loading a DCP checkpoint beside `dcp.load`, page cache warm: seconds, and bytes asked of the files.

python benchmarks/load.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from model import make_model, write_checkpoint

from dist_infer.checkpoint import load, open_checkpoint
from dist_infer.config.loader import LoaderOptions
from dist_infer.model.weights import describe


def main() -> None:
    """Alternate the two and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    model = make_model()
    state = {"model": {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}}
    size = sum(weight.nbytes for weight in state["model"].values())
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(model, Path(directory))
        times: dict[str, list[float]] = {"ours, tp=1": [], "ours, one rank of tp=2": [], "dcp.load": []}
        requested: dict[str, int] = {"dcp.load": size}
        for turn in range(rounds + 1):
            for tp, name in ((1, "ours, tp=1"), (2, "ours, one rank of tp=2")):
                began = time.perf_counter()
                checkpoint = open_checkpoint(directory)
                config = checkpoint.config()
                checkpoint.match(config)
                weights = list(describe(config, tp, 0))
                destinations = {w.parameter: torch.empty(w.shape, dtype=torch.bfloat16) for w in weights}
                report = load(checkpoint, config, weights, 1, 0, destinations, LoaderOptions())
                times[name] += [time.perf_counter() - began] if turn else []
                requested[name] = report.bytes_requested
            began = time.perf_counter()
            dcp.load(state, checkpoint_id=directory, no_dist=True)
            times["dcp.load"] += [time.perf_counter() - began] if turn else []
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:<24} {median:6.3f} s  {requested[name] / 1e6:7.1f} MB  {requested[name] / median / 1e9:5.2f} GB/s")


if __name__ == "__main__":
    main()

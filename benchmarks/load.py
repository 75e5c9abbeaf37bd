"""Loading speed, bytes and memory, beside safetensors and `torch.distributed.checkpoint.load`.

On one rank: our loader, from DCP and from safetensors, and `safetensors.torch.load_file` with a copy into a module's parameters.
On several: ours with rows cut (as FSDP cuts them) and with rows and columns cut (tp), and `dcp.load` into row-cut DTensors.
Each round starts fresh ranks, which load with every side in turn, from call to weights in place. The files are in the page cache.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from model import large_config, write_large_checkpoint
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import LlamaConfig, LlamaForCausalLM

from dist_infer import load_model

SAMPLE_S = 0.005  # how often memory is looked at


def load_ours(directory: Path, axis: str, *options: str) -> list[Tensor]:
    """Our own loader, which also checks that every weight is finite."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(axis,))
    decoder = load_model(str(directory), mesh, ["device=cpu", *options])
    return [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in decoder.parameters()]


def load_dcp(directory: Path) -> list[Tensor]:
    """`dcp.load` into empty tensors, their rows cut over the ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with torch.device("meta"):
        whole = LlamaForCausalLM(LlamaConfig.from_json_file(directory / "config.json")).state_dict()
    weights = {}
    for name, tensor in whole.items():
        local = torch.empty(tensor.shape[0] // mesh.size(), *tensor.shape[1:], dtype=torch.bfloat16)
        weights[name] = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    dcp.load({"model": weights}, checkpoint_id=directory)
    return [tensor.to_local() for tensor in weights.values()]


def load_safetensors(directory: Path) -> list[Tensor]:
    """`load_file`, and a copy into the parameters of an empty module."""
    found = load_file(directory / "model.safetensors")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_json_file(directory / "config.json")).to(torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            parameter.copy_(found[name])
    return list(model.parameters())


SIDES: dict[str, Callable[[Path], list[Tensor]]] = {
    "dist_infer, rows cut": lambda path: load_ours(path / "dcp", "fsdp"),
    "dist_infer, tp": lambda path: load_ours(path / "dcp", "tp"),
    "dcp.load": lambda path: load_dcp(path / "dcp"),
    "dist_infer": lambda path: load_ours(path / "dcp", "tp"),
    "dist_infer, unchecked": lambda path: load_ours(path / "dcp", "tp", "loader.check_finite=false"),
    "dist_infer, safetensors": lambda path: load_ours(path / "safetensors", "tp"),
    "safetensors": lambda path: load_safetensors(path / "safetensors"),
}
ALONE = ("dist_infer", "dist_infer, unchecked", "dcp.load", "dist_infer, safetensors", "safetensors")
TOGETHER = ("dist_infer, rows cut", "dist_infer, tp", "dcp.load")


def counter(file: str, name: str) -> int:
    """A number of this process, from /proc."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self", file).read_text().splitlines())
    return int(fields[name].split()[0])


class Peak:
    """The most anonymous memory this process has while the block runs, above what it has before."""

    def __enter__(self) -> Peak:
        """Begin to look."""
        self._before = self._most = counter("status", "RssAnon")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Look for the last time."""
        self._done.set()
        self._thread.join()
        self.bytes = 1024 * (max(self._most, counter("status", "RssAnon")) - self._before)

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self._most = max(self._most, counter("status", "RssAnon"))


def load_on_rank(rank: int, ranks: int, port: int, path: Path, size: int, order: list[str], out: Path) -> None:
    """One rank of a round: all sides in turn; the time counts until the slowest rank is done."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group("gloo")
    figures = {}
    for side in order:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the side before has freed goes back to the system
        # Memory that a virtual machine has not used lately costs its host a second a GB: every side finds some that was just used.
        torch.ones(size // ranks * 3 // 2, dtype=torch.uint8)
        dist.barrier()
        before = counter("io", "rchar")
        with Peak() as peak:
            began = time.perf_counter()
            weights = SIDES[side](path)
            seconds = torch.tensor(time.perf_counter() - began)
        held = sum(tensor.nbytes for tensor in weights)
        figure = torch.tensor([counter("io", "rchar") - before, held, peak.bytes - held])
        del weights
        total = figure.clone()
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        dist.all_reduce(total)
        dist.all_reduce(figure, dist.ReduceOp.MAX)
        figures[side] = {"seconds": float(seconds), "read": int(total[0]), "held": int(total[1]), "extra": int(figure[2])}
    if rank == 0:
        out.write_text(json.dumps(figures))
    dist.destroy_process_group()


def run_round(ranks: int, path: Path, size: int, order: list[str]) -> dict[str, dict[str, float]]:
    """The figures of each side."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.NamedTemporaryFile() as out:
        mp.start_processes(load_on_rank, (ranks, port, path, size, order, Path(out.name)), ranks, start_method="spawn")  # type: ignore[arg-type]
        return json.loads(Path(out.name).read_text())


def main() -> None:
    """Read the command line, run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4], help="ranks the weights are cut over: 1, 2, 4 or 8")
    parser.add_argument("--layers", type=int, default=24, help="layers of 96 MB each, beside 262 MB of embedding and head")
    parser.add_argument("--rounds", type=int, default=5, help="loads by each side")
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    records = []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        size = write_large_checkpoint(large_config(args.layers), path)
        print(f"checkpoint of {size / 1e9:.2f} GB, medians of {args.rounds} rounds")
        print("GB read: of files, by all ranks (safetensors maps its file instead)")
        print("extra MB: the most anonymous memory of a rank above its weights")
        print(f"{'ranks':>6} {'side':>24} {'seconds':>9} {'GB/s':>7} {'GB read':>9} {'read/held':>10} {'extra MB':>9}", flush=True)
        for ranks in args.ranks:
            sides = list(ALONE if ranks == 1 else TOGETHER)
            rounds = []
            for number in range(args.rounds):
                turned = number % len(sides)
                rounds.append(run_round(ranks, path, size, sides[turned:] + sides[:turned]))
            for side in sides:
                middle = {name: statistics.median(figures[side][name] for figures in rounds) for name in rounds[0][side]}
                records.append({"ranks": ranks, "side": side, "bytes": size, "rounds": [figures[side] for figures in rounds]})
                print(
                    f"{ranks:>6} {side:>24} {middle['seconds']:>9.3f} {size / middle['seconds'] / 1e9:>7.2f} {middle['read'] / 1e9:>9.3f} "
                    f"{middle['read'] / middle['held']:>10.3f} {middle['extra'] / 1e6:>9.0f}",
                    flush=True,
                )
    if args.json is not None:
        args.json.write_text(json.dumps({"torch": torch.__version__, "records": records}, indent=2) + "\n")


if __name__ == "__main__":
    main()

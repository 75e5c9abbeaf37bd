"""Loading speed, bytes and memory, beside safetensors and `torch.distributed.checkpoint.load`.

On one rank: our loader, from DCP and from safetensors, and `safetensors.torch.load_file` with a copy into a module's parameters.
On several: ours with rows cut (as FSDP cuts them) and with rows and columns cut (tp), and `dcp.load` into row-cut DTensors.
Each round starts fresh ranks. Every side in turn makes empty parameters and loads into them, and then loads into the same ones again:
"first" counts from the call to weights in place and includes what the system takes for giving memory, "again" is the loader alone
(opening and checking the checkpoint included). The files are in the page cache.
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
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from model import model_config, write_model
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import LlamaConfig, LlamaForCausalLM

from dist_infer.checkpoint.shard import ModelShard
from dist_infer.config.options import read_options
from dist_infer.distributed.mesh import Mesh, MeshShape
from dist_infer.distributed.world import World
from dist_infer.engine.blueprint import Blueprint

SAMPLE_S = 0.005  # how often memory is looked at


class Side(NamedTuple):
    """Parameters, and what loads into them."""

    weights: list[Tensor]
    load: Callable[[], int | None]  # returns the bytes it asked of files, if it counts them


def ours(directory: Path, axis: str, *overrides: str) -> Side:
    """Our own loader, which also checks that every weight is finite."""
    options = read_options(["device=cpu", f"model.path={directory}", *overrides])
    blueprint = Blueprint.of(options)
    ranks = dist.get_world_size()
    shape = MeshShape(1, ranks, 1) if axis == "fsdp" else MeshShape(1, 1, ranks)
    world = World.join(options.parallel, "cpu", shape.size, may_exit=False)
    shard = ModelShard(blueprint.config, Mesh(world, shape, options.parallel), blueprint.dtype, world.device)
    weakref.finalize(shard, world.close)

    def load() -> int:
        opened = Blueprint.of(options).checkpoint
        assert opened is not None
        return shard.load(opened, options.loader).bytes_requested

    return Side(list(shard.destinations().values()), load)


def of_dcp(directory: Path, columns: tuple[str, ...] = ()) -> Side:
    """`dcp.load` into tensors whose rows are cut over the ranks, or the columns of those named."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with torch.device("meta"):
        whole = LlamaForCausalLM(LlamaConfig.from_json_file(directory / "config.json")).state_dict()
    weights = {}
    for name, tensor in whole.items():
        dim = int(name.endswith(columns)) if columns else 0
        shape = list(tensor.shape)
        shape[dim] //= mesh.size()
        weights[name] = DTensor.from_local(torch.empty(shape, dtype=torch.bfloat16), mesh, [Shard(dim)], run_check=False)
    return Side([tensor.to_local() for tensor in weights.values()], lambda: dcp.load({"model": weights}, checkpoint_id=directory))


def of_safetensors(directory: Path) -> Side:
    """`load_file`, and a copy into the parameters of an empty module."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_json_file(directory / "config.json")).bfloat16()
    model.to_empty(device="cpu")

    @torch.no_grad()
    def load() -> None:
        found = load_file(directory / "model.safetensors")
        for name, parameter in model.state_dict().items():
            parameter.copy_(found[name])

    return Side(list(model.parameters()), load)


SIDES: dict[str, Callable[[Path], Side]] = {
    "dist_infer, rows cut": lambda path: ours(path / "dcp", "fsdp"),
    "dist_infer, tp": lambda path: ours(path / "dcp", "tp"),
    "dcp.load": lambda path: of_dcp(path / "dcp"),
    "dcp.load, tp": lambda path: of_dcp(path / "dcp", ("o_proj.weight", "down_proj.weight")),
    "dist_infer": lambda path: ours(path / "dcp", "tp"),
    "dist_infer, unchecked": lambda path: ours(path / "dcp", "tp", "loader.check_finite=false"),
    "dist_infer, safetensors": lambda path: ours(path / "safetensors", "tp"),
    "load_file and copy": lambda path: of_safetensors(path / "safetensors"),
}
ALONE = ("dist_infer", "dist_infer, unchecked", "dcp.load", "dist_infer, safetensors", "load_file and copy")
TOGETHER = ("dist_infer, rows cut", "dcp.load", "dist_infer, tp", "dcp.load, tp")


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
    """One rank of a round: all sides in turn; a load lasts until the slowest rank is done."""
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
            weights, load = SIDES[side](path)
            asked = load()
            first = time.perf_counter() - began
        read = counter("io", "rchar") - before if asked is None else asked
        dist.barrier()
        began = time.perf_counter()
        load()
        seconds = torch.tensor([first, time.perf_counter() - began])
        held = sum(tensor.nbytes for tensor in weights)
        figure = torch.tensor([read, held, peak.bytes - held])
        del weights, load
        total = figure.clone()
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        dist.all_reduce(total)
        dist.all_reduce(figure, dist.ReduceOp.MAX)
        first, again = seconds.tolist()
        figures[side] = {"first": first, "again": again, "read": int(total[0]), "held": int(total[1]), "extra": int(figure[2])}
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
        size = write_model(model_config("1.3B", num_hidden_layers=args.layers), path)
        print(f"checkpoint of {size / 1e9:.2f} GB, medians of {args.rounds} rounds")
        print("GB/s: of the second load; GB read: asked of files by all ranks, in one load (load_file maps its file instead)")
        print("extra MB: the most anonymous memory of a rank above its weights")
        print(
            f"{'ranks':>6} {'side':>24} {'first s':>8} {'again s':>8} {'GB/s':>7} {'GB read':>9} {'read/held':>10} {'extra MB':>9}",
            flush=True,
        )
        for ranks in args.ranks:
            sides: list[str] = list(ALONE if ranks == 1 else TOGETHER)
            rounds = []
            for number in range(args.rounds):
                turned = number % len(sides)
                rounds.append(run_round(ranks, path, size, sides[turned:] + sides[:turned]))
            for side in sides:
                middle = {name: statistics.median(figures[side][name] for figures in rounds) for name in rounds[0][side]}
                records.append({"ranks": ranks, "side": side, "bytes": size, "rounds": [figures[side] for figures in rounds]})
                print(
                    f"{ranks:>6} {side:>24} {middle['first']:>8.3f} {middle['again']:>8.3f} {size / middle['again'] / 1e9:>7.2f} "
                    f"{middle['read'] / 1e9:>9.3f} {middle['read'] / middle['held']:>10.3f} {middle['extra'] / 1e6:>9.0f}",
                    flush=True,
                )
    if args.json is not None:
        args.json.write_text(json.dumps({"torch": torch.__version__, "records": records}, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Loading speed beside `torch.distributed.checkpoint.load`, with the weights cut by rows over the ranks (as FSDP cuts them).

Each round starts fresh ranks, which load the checkpoint with every side in turn, from call to weights in place. The files are
in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from model import make_model, write_checkpoint
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers import LlamaConfig, LlamaForCausalLM

from dist_infer import load_model


def load_ours(path: Path, mesh: DeviceMesh) -> None:
    """Our own loader, which also checks that every weight is finite."""
    load_model(str(path), mesh, ["device=cpu"])


def load_unchecked(path: Path, mesh: DeviceMesh) -> None:
    """Our own loader without that check."""
    load_model(str(path), mesh, ["device=cpu", "loader.check_finite=false"])


def load_dcp(path: Path, mesh: DeviceMesh) -> None:
    """`dcp.load` into empty sharded tensors."""
    with torch.device("meta"):
        whole = LlamaForCausalLM(LlamaConfig.from_json_file(path / "config.json")).state_dict()
    weights = {}
    for name, tensor in whole.items():
        if name != "lm_head.weight":
            rows = tensor.shape[0] // mesh.size()
            local = torch.empty(rows, *tensor.shape[1:], dtype=torch.bfloat16)
            weights[name] = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
    dcp.load({"model": weights}, checkpoint_id=path)


SIDES: dict[str, Callable[[Path, DeviceMesh], None]] = {
    "dist_infer": load_ours,
    "unchecked": load_unchecked,
    "dcp.load": load_dcp,
}


def bytes_read() -> int:
    """Bytes this process has read from files so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def load_on_rank(rank: int, ranks: int, port: int, path: Path, order: list[str], out: Path) -> None:
    """One rank of a round: both sides in turn; the time counts until the slowest rank is done."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("fsdp",))
    figures = {}
    for side in order:
        dist.barrier()
        before, began = bytes_read(), time.perf_counter()
        SIDES[side](path, mesh)
        read = torch.tensor([bytes_read() - before])
        dist.all_reduce(read, dist.ReduceOp.MAX)  # also waits for all
        figures[side] = [time.perf_counter() - began, int(read)]
    if rank == 0:
        out.write_text(json.dumps(figures))
    dist.destroy_process_group()


def run_round(ranks: int, path: Path, order: list[str]) -> dict[str, list[float]]:
    """Seconds and most bytes read by a rank, for each side."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.NamedTemporaryFile() as out:
        mp.start_processes(load_on_rank, (ranks, port, path, order, Path(out.name)), ranks, start_method="spawn")  # type: ignore[arg-type]
        return json.loads(Path(out.name).read_text())


def main() -> None:
    """Read the command line, run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="ranks the weights are cut over; they must divide 32")
    parser.add_argument("--rounds", type=int, default=3, help="loads by each side")
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    records = []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        write_checkpoint(make_model(), path)
        size = sum(file.stat().st_size for file in path.glob("*.distcp"))
        print(f"checkpoint of {size / 1e9:.2f} GB, medians of {args.rounds} rounds")
        print(f"{'ranks':>6} {'side':>12} {'seconds':>9} {'GB/s':>7} {'GB read by a rank':>18}", flush=True)
        for ranks in args.ranks:
            rounds = [run_round(ranks, path, sorted(SIDES, reverse=bool(number % 2))) for number in range(args.rounds)]
            for side in SIDES:
                seconds = [figures[side][0] for figures in rounds]
                record = {"ranks": ranks, "side": side, "seconds": seconds, "bytes_read": rounds[0][side][1], "bytes": size}
                records.append(record)
                middle = statistics.median(seconds)
                print(f"{ranks:>6} {side:>12} {middle:>9.3f} {size / middle / 1e9:>7.2f} {record['bytes_read'] / 1e9:>18.3f}", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps({"torch": torch.__version__, "records": records}, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""The sharded module alone: its numbers, how its ranks leave, and that processes which keep it end well."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from dist_infer import load_model
from dist_infer.distributed.health import RankFailure
from dist_infer.model.batch import Batch, TokenSpan
from dist_infer.model.decoder import Decoder
from tests.engine.references import make_model, reference
from tests.ranks import Ranks

FLOAT32 = ["device=cpu", "model.dtype=float32"]
REFERENCE = reference("kempnerforge")
# Keeps its module to the end, and says last of all which threads are still there.
KEEPER = """
import atexit, sys, threading
atexit.register(lambda: print([thread.name for thread in threading.enumerate()]))
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from dist_infer import load_model
rank, store, path = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
decoder = load_model(path, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), ["device=cpu"])
dist.destroy_process_group()
"""


@torch.no_grad()
def logits_of(decoder: Decoder, tokens: list[int]) -> Tensor:
    """[tokens, vocabulary of this rank]: all but the last in one span, the last alone."""
    cache, parts = decoder.new_cache(blocks=9, block_size=4), []
    for first, stop in ((0, len(tokens) - 1), (len(tokens) - 1, len(tokens))):
        span = TokenSpan(tokens[first:stop], first, np.arange(8, 0, -1, dtype=np.int32), stop - first)
        decoder(Batch.of([span], 4, decoder.rotary, torch.device("cpu")), cache, lambda rows, _: parts.append(rows.clone()))
    return torch.cat(parts)


def on_a_mesh(axis: str) -> tuple[np.ndarray, list[str]]:
    """Logits of this rank's input, and the threads of ours that are left once its module is gone."""
    decoder = load_model(REFERENCE.path, init_device_mesh("cpu", (2,), mesh_dim_names=(axis,)), FLOAT32)
    assert isinstance(decoder, Decoder)
    assert any("watchdog" in thread.name for thread in threading.enumerate())
    found = logits_of(decoder, REFERENCE.inputs[0 if axis == "tp" else dist.get_rank()])
    del decoder
    gc.collect()
    return found.numpy(), [thread.name for thread in threading.enumerate() if "watchdog" in thread.name]


def damaged(path: str) -> str:
    """What this rank is told when rank 1 finds damage: while it loads, or when it wants to compute with the others."""
    try:
        decoder = load_model(path, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), FLOAT32)
        assert isinstance(decoder, Decoder)
        while True:
            logits_of(decoder, [1, 2, 3])
    except (ValueError, RankFailure) as error:
        return f"{type(error).__name__}: {error}"


def test_numbers_on_meshes_and_leaving(ranks: Ranks) -> None:
    one = load_model(REFERENCE.path, None, FLOAT32)
    assert isinstance(one, Decoder)
    alone = [logits_of(one, tokens).numpy() for tokens in REFERENCE.inputs[:2]]
    np.testing.assert_allclose(alone[0], REFERENCE.logits[0], atol=1e-4 * float(REFERENCE.logits[0].abs().max()))
    cut, rows = ranks(2).run(on_a_mesh, "tp"), ranks(2).run(on_a_mesh, "fsdp")
    np.testing.assert_allclose(np.concatenate([found for found, _ in cut], axis=1), alone[0], atol=1e-4)
    for (found, _), expected in zip(rows, alone, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert [threads for _, threads in cut + rows] == [[]] * 4


def test_processes_that_keep_it_end_in_order(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KEEPER]
    arguments = [str(tmp_path / "store"), REFERENCE.path]
    processes = [
        subprocess.Popen([*command, str(rank), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert [out for out, _ in said] == ["['MainThread']\n"] * 2
    assert not any("dist_infer" in err or "terminate" in err for _, err in said), said


def test_damage_that_one_rank_finds_is_told_on_every_rank(ranks: Ranks, tmp_path: Path) -> None:
    model = make_model(tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[-1] = float("nan")
    model.save_pretrained(tmp_path)
    first, second = ranks(2).run(damaged, str(tmp_path))
    assert second.startswith("ValueError: ") and "gate_proj" in second
    assert first.startswith("RankFailure: rank 1 (") and "gate_proj" in first

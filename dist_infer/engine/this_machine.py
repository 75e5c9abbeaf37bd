"""This machine as a cluster of one: what its cores, its memory and its page cache give, measured in a few seconds."""

from __future__ import annotations

import contextlib
import math
import mmap
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dist_infer.checkpoint.checkpoint import load, open_checkpoint
from dist_infer.config.loader import LoaderOptions
from dist_infer.distributed.collectives import SingleRank
from dist_infer.distributed.shared_memory import SharedMemory, segment_size
from dist_infer.engine.cluster import CONTROL_S, Cluster, Link, Rates
from dist_infer.engine.memory import free_bytes
from dist_infer.model import huge_pages
from dist_infer.model.batch import Batch, TokenSpan
from dist_infer.model.cache import KVCache
from dist_infer.model.config import ModelConfig
from dist_infer.model.decoder import Decoder
from dist_infer.model.layers import Linear
from dist_infer.model.native import kernels
from dist_infer.model.weights import describe

Found = TypeVar("Found")

# Larger than the caches of a few cores, so that weights come from memory, as a model's do.
PROBE = ModelConfig("llama", 4096, 1024, 2816, layers=8, heads=16, kv_heads=4, head_dim=64, norm_eps=1e-5, max_position=4096)
# So small that a layer takes what Python and the calls of kernels take.
SLIGHT = replace(PROBE, vocab_size=64, hidden_size=64, ffn_size=64, heads=2, kv_heads=1, head_dim=32)
BLOCK_SIZE = 16
DECODES, CONTEXT = 16, 512  # sequences, and the tokens each has, when attention is measured
PREFILL = 1024  # tokens of the span whose attention is measured
FEW_LAYERS = 2  # are enough where arithmetic takes long
LOADS = 5  # of the probe, a gigabyte in bfloat16
FRESH = 1 << 30  # bytes of memory that nobody used lately; the later half counts, as a hypervisor may still have some at hand
READS = 50  # of all weights
ROWS = 256  # of products that arithmetic limits
SMALL, LARGE = 8 << 10, 1 << 20  # bytes of all-reduces
NARROW, WIDE = 64, 8192  # outputs of the projection whose weight is gathered
TIMEOUT_S = 60.0  # of what processes of ours measure


def measure(dtype: torch.dtype, pack: bool, native: bool) -> Cluster:
    """This machine's figures for models that compute in `dtype`.

    Args:
        dtype: Type of weights and KV cache.
        pack: Whether weights are packed.
        native: Whether compiled kernels are used.
    """
    cores, memory = len(os.sched_getaffinity(0)), free_bytes(torch.device("cpu"), 1)
    shared = gathers = Link(math.inf, 0)
    with tempfile.TemporaryDirectory() as directory:
        fresh = _forked(1, _freshness)  # first: what comes next has its memory from it
        _forked(1, _saving, directory, dtype)
        storage = cut_storage = _forked(1, _loading, 1, directory, dtype)
        if cores > 1:
            cut_storage = _forked(2, _loading, 2, directory, dtype)
            shared, gathers = _forked(2, _links, directory, mmap.mmap(-1, segment_size(2)), dtype)
    with torch.inference_mode():
        probe, slight = _Probe(PROBE, dtype, native), _Probe(SLIGHT, dtype, native)
        packed = plain = probe.products()
        packing = math.inf
        if pack:
            packing = probe.pack()
            slight.pack()
            packed = probe.products()
        found = [packed]  # at several moments: for seconds memory may give half of what it gives in the next
        layer_s, step_s = slight.host()
        found.append(probe.products())
        attention = probe.attention(packed)
        found.append(probe.products())
        packed = Rates(*(statistics.median(getattr(one, name) for one in found) for name in ("bandwidth", "flops")))
    return Cluster(
        name="this machine",
        kind="cpu",
        nodes=1,
        devices=cores,
        memory=memory // cores,
        products=_of_core(packed, cores),
        gathered_products=_of_core(plain, cores),
        attention=_of_core(attention, cores),
        intra=shared,
        gather=gathers,
        inter=Link(math.inf, 0),
        control=max(CONTROL_S, shared.latency),
        storage=storage,
        cut_storage=cut_storage,
        fresh=fresh,
        packing=packing,
        layer_s=layer_s,
        step_s=step_s,
        overlaps=False,
    )


def _of_core(rates: Rates, cores: int) -> Rates:
    return Rates(rates.bandwidth / cores, rates.flops / cores)


class _Probe:
    """A decoder of constant weights, whose parts are timed."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, native: bool) -> None:
        self.dtype = dtype
        cpu = torch.device("cpu")
        with torch.device("meta"):
            decoder = Decoder(config, SingleRank(), cpu).to(dtype)
        self.decoder = decoder.to_empty(device=cpu)
        huge_pages.use(self.decoder)
        for parameter in self.decoder.parameters():
            parameter.fill_(0.01)
        self.decoder.use(kernels(dtype) if native else None)
        self.linears = [module for block in self.decoder.blocks for module in block.modules() if isinstance(module, Linear)]
        self.elements = sum(linear.inputs * linear.outputs for linear in self.linears)

    def pack(self) -> float:
        """Pack the weights; returns bytes/s."""
        began = time.perf_counter()
        for linear in self.linears:
            linear.pack(keep_weight=False)
        return self.elements * self.dtype.itemsize / (time.perf_counter() - began)

    def products(self) -> Rates:
        """Of the projections alone: bandwidth with one row, arithmetic with many."""
        some = self.linears[: len(self.linears) * FEW_LAYERS // PROBE.layers]
        read_s, computed_s = self._multiply(self.linears, 1, READS), self._multiply(some, ROWS)
        operations = 2 * ROWS * sum(linear.inputs * linear.outputs for linear in some)
        return Rates(self.elements * self.dtype.itemsize / read_s, operations / computed_s)

    def _multiply(self, linears: list[Linear], rows: int, times: int = 15) -> float:
        """Seconds of products with `rows` rows."""
        inputs = [torch.ones(rows, linear.inputs, dtype=self.dtype) for linear in linears]
        return _usual(lambda: [linear(x) for linear, x in zip(linears, inputs, strict=True)], times)

    def host(self) -> tuple[float, float]:
        """Seconds of a layer, its products aside, and of a step beside its layers."""
        cache = self._cache(BLOCK_SIZE)
        times = []
        for layers in (PROBE.layers, FEW_LAYERS):
            with self._only(layers):
                times.append(_usual(lambda: self._step(cache, 1, 1, 8)))
        layer_s = max(0.0, (times[0] - times[1]) / (PROBE.layers - FEW_LAYERS))
        step_s = max(0.0, times[1] - FEW_LAYERS * layer_s)
        return max(0.0, layer_s - self._multiply(self.linears, 1) / PROBE.layers), step_s

    def attention(self, most: Rates) -> Rates:
        """Bandwidth of many short contexts against long ones, arithmetic of short spans against a long one."""
        cache = self._cache(DECODES * CONTEXT)
        short, long = (_usual(lambda context=context: self._step(cache, DECODES, 1, context)) for context in (BLOCK_SIZE, CONTEXT))
        read = DECODES * (CONTEXT - BLOCK_SIZE) * 2 * PROBE.kv_heads * PROBE.head_dim * self.dtype.itemsize * PROBE.layers
        with self._only(FEW_LAYERS):
            count = 16
            many, one = (_usual(lambda n=n: self._step(cache, n, PREFILL // n, PREFILL // n), 3) for n in (count, 1))
        scores = (PREFILL**2 - PREFILL**2 // count) // 2
        operations = 4 * PROBE.heads * PROBE.head_dim * scores * FEW_LAYERS
        # Differences are noisy; no kernel is faster than products.
        return Rates(min(most.bandwidth, read / max(long - short, 1e-9)), min(most.flops, operations / max(one - many, 1e-9)))

    def _cache(self, tokens: int) -> KVCache:
        return self.decoder.new_cache(-(-tokens // BLOCK_SIZE) + 2, BLOCK_SIZE)

    def _step(self, cache: KVCache, sequences: int, length: int, context: int) -> None:
        """A step of some sequences' last `length` of `context` tokens."""
        width = -(-context // BLOCK_SIZE)
        tables = 1 + np.arange(sequences * width, dtype=np.int32).reshape(sequences, width)
        spans = [TokenSpan([1] * length, context - length, table) for table in tables]
        batch = Batch.of(spans, BLOCK_SIZE, self.decoder.rotary, torch.device("cpu"))
        self.decoder(batch, cache, lambda logits, first: None)

    @contextlib.contextmanager
    def _only(self, layers: int) -> Iterator[None]:
        """The decoder with its first layers alone."""
        blocks, rotations = self.decoder.blocks, self.decoder.rotations
        self.decoder.blocks, self.decoder.rotations = blocks[:layers], rotations[:layers]
        yield
        self.decoder.blocks, self.decoder.rotations = blocks, rotations


def _usual(call: Callable[[], object], times: int = 15) -> float:
    """Seconds of the call in the middle of some, after one that is not counted.

    The fastest would be what the machine gives in a moment without neighbours; a run lasts longer than that.
    """
    call()
    found = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def _freshness(rank: int) -> float:
    """Bytes/s of what memory that nobody used lately costs, beside what any memory costs."""
    half = FRESH // 2
    first = huge_pages.zeros((half,), torch.uint8).fill_(1)  # held, so that the next half is other memory
    times = []
    for _ in range(2):  # the second time that memory has just been given back
        began = time.perf_counter()
        huge_pages.zeros((half,), torch.uint8).fill_(1)
        times.append(time.perf_counter() - began)
    del first
    return half / max(times[0] - times[1], 1e-9)


def _saving(rank: int, directory: str, dtype: torch.dtype) -> None:
    """Write the model that `_loading` reads."""
    pieces = [piece for weight in describe(PROBE) for piece in weight.pieces]
    save_file({piece.name: torch.ones(piece.shape, dtype=dtype) for piece in pieces}, Path(directory, "model.safetensors"))


def _loading(rank: int, ranks: int, directory: str, dtype: torch.dtype) -> float:
    """Bytes/s of our loader in all ranks, as tp cuts the model, from the page cache into memory that is at hand."""
    weights = list(describe(PROBE, ranks, rank))
    checkpoint, filled, rates = open_checkpoint(directory), [], []
    for _ in range(LOADS):
        destinations = {weight.parameter: torch.empty(weight.shape, dtype=dtype) for weight in weights}
        huge_pages.prefer(destinations.values())
        began = time.perf_counter()
        read = load(checkpoint, PROBE, weights, 1, 0, destinations, LoaderOptions()).bytes_requested
        rates.append(ranks * read / (time.perf_counter() - began))
        filled.append(destinations)  # so that the next one has memory of its own
    return statistics.median(rates)


def _links(rank: int, directory: str, segment: mmap.mmap, dtype: torch.dtype) -> tuple[Link, Link]:
    """All-reduce through shared memory, and FSDP's gathers, between two processes of one thread each."""
    torch.set_num_threads(1)
    return _all_reduces(SharedMemory(segment, rank, (0, 1), True, TIMEOUT_S)), _gathers(rank, f"{directory}/store", dtype)


def _forked(count: int, work: Callable[..., Found], *args: object) -> Found:
    """What the first of `count` processes finds, each of which calls work(rank, *args).

    Raises:
        RuntimeError: One failed, or the first took too long.
    """
    context = multiprocessing.get_context("fork")  # quick, and our threads are not running yet
    ours, theirs = context.Pipe()
    processes = [context.Process(target=_answer, args=(rank, work, args, theirs), daemon=True) for rank in range(count)]
    for process in processes:
        process.start()
    theirs.close()  # so that we are told when all of them are gone
    try:
        found, error = ours.recv() if ours.poll(TIMEOUT_S) else (None, f"no answer within {TIMEOUT_S:g} s")
    except EOFError:
        found, error = None, "a process ended without an answer; perhaps it had too little memory"
    for process in processes:
        if error:
            process.kill()
        process.join()
    if error:
        raise RuntimeError(f"this machine could not be measured: {error}")
    return cast("Found", found)


def _answer(rank: int, work: Callable[..., object], args: tuple[object, ...], answers: Connection) -> None:
    """What a forked process does; the first answers, or who fails."""
    try:
        found = work(rank, *args)
        if rank == 0:
            answers.send((found, ""))
    except Exception as error:
        answers.send((None, f"{type(error).__name__}: {error}"))
    finally:
        os._exit(0)


def _all_reduces(communicator: SharedMemory) -> Link:
    times = []
    for size in (SMALL, LARGE):
        tensor = torch.zeros(size // 2, dtype=torch.bfloat16)
        times.append(_usual(lambda tensor=tensor: [communicator.all_reduce(tensor) for _ in range(20)]) / 20)
    bandwidth = (LARGE - SMALL) / max(times[1] - times[0], 1e-9)
    return Link(bandwidth, max(0.0, times[0] - SMALL / bandwidth))


def _gathers(rank: int, store: str, dtype: torch.dtype) -> Link:
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    mesh, inputs, times = init_device_mesh("cpu", (2,)), PROBE.hidden_size, []
    with torch.no_grad():
        x = torch.ones(1, inputs, dtype=dtype)
        for outputs in (NARROW, WIDE):
            linear = nn.Linear(inputs, outputs, bias=False, dtype=dtype)
            alone = _usual(lambda linear=linear: linear(x))
            fully_shard(linear, mesh=mesh, reshard_after_forward=True)
            times.append(_usual(lambda linear=linear: linear(x)) - alone)
    dist.destroy_process_group()
    size = inputs * (WIDE - NARROW) * dtype.itemsize / 2  # what either rank receives
    bandwidth = size / max(times[1] - times[0], 1e-9)
    return Link(bandwidth, max(0.0, times[0]))

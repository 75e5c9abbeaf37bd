"""A running model: this rank's part of it, from the first check to the last step."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from dist_infer.checkpoint.checkpoint import open_checkpoint
from dist_infer.checkpoint.content import content_hash, hash_weights
from dist_infer.checkpoint.plan import Read, plan
from dist_infer.checkpoint.prefetch import Prefetch
from dist_infer.checkpoint.reader import LoadReport
from dist_infer.checkpoint.shard import ModelShard
from dist_infer.config.options import Options
from dist_infer.distributed.launch import RankVariables
from dist_infer.distributed.mesh import Mesh, MeshShape, choose_mesh
from dist_infer.distributed.world import World
from dist_infer.engine.blocks import BlockAllocator
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.engine import Delta, Engine
from dist_infer.engine.memory import KVPlan, free_bytes
from dist_infer.engine.request import Request, Result
from dist_infer.engine.runner import Runner
from dist_infer.engine.scheduler import RopeRules, Scheduler
from dist_infer.engine.shared_work import SharedWork
from dist_infer.model.native import Kernels, kernels
from dist_infer.model.weights import describe

Sink = Callable[[list[Delta], list[Result]], None]
USER_ERRORS = (ValueError, OSError)
NOT_ARCHITECTURE = ("dtype", "bos_token_id", "eos_token_ids")  # fields of ModelConfig that a swap may change


class Session:
    """One rank of a running model.

    Every rank makes one. The conductor then calls `run`; the others call `serve`, which returns when
    the conductor's call is over (`scripted`) or the session closes.

    Args:
        options: What the user set.
        blueprint: Makes the blueprint; called once the ranks can tell each other of its errors.
        scripted: All ranks run the same program, call by call; else they serve until the end. A script's process is
            never ended from within: it gets exceptions.
        say: Prints a line for the user; called on the conductor only.
        check: Further cheap checks, made on the conductor before anything expensive.
        weights: Whole tensors in memory, by canonical name, instead of a checkpoint.

    Raises:
        ValueError, OSError: A user's mistake; on every rank the same.
        RankFailure: A rank failed.
    """

    def __init__(
        self,
        options: Options,
        blueprint: Callable[[], Blueprint],
        scripted: bool = False,
        say: Callable[[str], None] | None = None,
        check: Callable[[Blueprint], None] | None = None,
        weights: Mapping[str, Callable[[], Tensor]] | None = None,
    ) -> None:
        self.options = options
        self._alone = RankVariables.read() is None and not dist.is_initialized()
        self.scripted = scripted and not self._alone  # ranks that we start ourselves serve until the end
        self.may_exit = not scripted
        self._say = say or (lambda line: None)
        self.world, self.blueprint, shape, why = self._meet(blueprint, check)
        self.content_hash: str | None = None
        self._ahead: Prefetch | None = None
        self._lost: str | None = None  # why there are no weights any more
        try:
            self.mesh = Mesh(self.world, shape, options.parallel)
            if self.is_conductor:
                if self.blueprint.checkpoint is not None and self.blueprint.checkpoint.note:
                    self._say(self.blueprint.checkpoint.note)
                for warning in self.blueprint.generation.warnings:
                    self._say(f"generation_config.json: {warning}")
                self._say(why)
            self._load(weights)
        except BaseException as error:
            self._leave(error)
            raise

    @property
    def is_conductor(self) -> bool:
        """Whether this rank owns the requests."""
        return self.world.rank == 0

    def run(self, requests: list[Request], sink: Sink) -> None:
        """Run `requests` on all replicas (on the conductor); `sink` gets deltas of its own replica and results of all.

        Raises:
            RankFailure: A rank failed.
        """
        assert self.engine is not None
        self._check_weights()
        with self._guarded():
            self.engine.resume()
            if self.work is None:
                self.engine.run(iter(requests), sink)
            else:
                self._run_shared(requests, sink)
            self._end_call()

    def stream(self, request: Request) -> Iterator[Delta | Result]:
        """Run one request on the conductor's own replica, handing on every delta; ends with its result."""
        assert self.engine is not None
        self._check_weights()
        with self._guarded():
            self.engine.resume()
            if self.work is not None:
                self.work.publish([])
            try:
                refused = self.engine.submit(request)
                if refused is not None:
                    yield refused
                while self.engine.busy:
                    deltas, results = self.engine.step()
                    yield from deltas
                    yield from results
            finally:
                self.engine.cancel(request)
                self._end_call()

    def serve(self) -> None:
        """Do this rank's part (on all ranks but the conductor) of one call (scripted), or of all until the end.

        Raises:
            RankFailure: A rank failed.
        """
        with self._guarded():
            if self.engine is None:
                self.runner.follow(self._swap)
                return
            assert self.work is not None
            while self.work.await_call():
                path = self.work.swapped_to()
                if path is not None:
                    self.engine.swap(path)
                    self._swap(path)
                    self.work.finish()
                    continue
                self.engine.resume()
                self.engine.run(self.work.take(), lambda _, results: self.work.deliver(results) if self.work else None)
                self._end_call()
                if self.scripted:
                    return
            self.engine.close()

    def swap(self, path: str) -> None:
        """Load the weights of the checkpoint at `path`, of the same architecture, over the present ones.

        Called by every rank of a script, else by the conductor alone.

        Raises:
            ValueError: Requests are running, or the checkpoint cannot be used; the present weights stay in use.
            RankFailure: A rank failed when weights were overwritten already; in a world of one its own error.
        """
        if self.engine is not None and self.engine.busy:
            raise ValueError(f"swap to {path}: a request is still running; finish or close its stream first")
        self._check_weights()
        path = os.path.abspath(path) if os.path.exists(path) else path
        if not self.scripted:
            assert self.engine is not None
            if self.work is not None:
                self.work.publish_swap(path)
            self.engine.swap(path)
        refused = self._swap(path)
        if not self.scripted and self.work is not None:
            self.work.finish()
        if refused is not None:
            raise ValueError(refused)

    def prefetch(self, path: str) -> None:
        """Bring what a later `swap` to `path` reads into the page cache, in the background; errors are kept for the swap.

        Called as `swap` is: ranks that this process started are on its host, so it reads for all of them.
        """
        if self._ahead is not None:
            self._ahead.stop()
        shape, at = self.mesh.shape, self.mesh.coordinates

        def reads() -> tuple[Path, list[Read]]:
            successor = self._successor(path)
            checkpoint, config = successor.checkpoint, successor.config
            assert checkpoint is not None
            weights, fsdp, coordinate = (self.shard.weights, shape.fsdp, at.fsdp) if self.scripted else (list(describe(config)), 1, 0)
            return checkpoint.source.root, plan(weights, fsdp, coordinate, checkpoint.index, checkpoint.dialect, config)

        self._ahead = Prefetch(os.path.abspath(path) if os.path.exists(path) else path, reads)

    def close(self, error: BaseException | None = None) -> None:
        """End the session; every rank calls this. With `error` the workers leave with it."""
        self._leave(error)

    def _meet(self, make: Callable[[], Blueprint], check: Callable[[Blueprint], None] | None) -> tuple[World, Blueprint, MeshShape, str]:
        """Check all that is cheap and meet the other ranks, in whichever order lets everyone hear of a mistake."""
        options = self.options
        found: tuple[Blueprint, MeshShape, str] | None = None
        size, command = None, None
        if self._alone:
            found = self._check(make, check, None, 1, conductor=True)
            size, command = found[1].size, [sys.executable, "-m", "dist_infer", "worker", json.dumps(options.to_json())]
        world = World.join(options.parallel, options.device, size, command, may_exit=self.may_exit)
        try:
            error: str | None = None
            try:
                found = found or self._check(make, check, world.size, world.local_size, conductor=world.rank == 0)
            except USER_ERRORS as mistake:
                error = str(mistake)
            checked = world.exchange("checks", [error, astuple(found[1]) if found else None])
        except BaseException:
            world.close(failed=True)
            raise
        wrong = next(((rank, text) for rank, (text, _) in enumerate(checked) if text is not None), None)
        if wrong is not None:
            world.close()
            rank, text = wrong
            raise ValueError(text if rank == 0 else f"rank {rank}: {text}")
        assert found is not None
        # Free memory, which a mesh may depend on, differs from rank to rank: rank 0's choice counts.
        return world, found[0], MeshShape(*checked[0][1]), found[2]

    def _check(
        self,
        make: Callable[[], Blueprint],
        check: Callable[[Blueprint], None] | None,
        world_size: int | None,
        ranks_per_node: int,
        conductor: bool,
    ) -> tuple[Blueprint, MeshShape, str]:
        """All that can be known before ranks meet or weights are read."""
        blueprint = make()
        shape, why = self._shape(blueprint, world_size, ranks_per_node)
        if conductor and check is not None:
            check(blueprint)
        return blueprint, shape, why

    def _shape(self, blueprint: Blueprint, world_size: int | None, ranks_per_node: int) -> tuple[MeshShape, str]:
        options = self.options
        model_bytes = blueprint.parameters * blueprint.dtype.itemsize
        on_gpu = options.device != "cpu" and torch.cuda.is_available()
        device = torch.device("cuda" if on_gpu else "cpu")
        shape, why = choose_mesh(
            options.parallel,
            world_size,
            ranks_per_node,
            heads=blueprint.config.heads,
            model_bytes=model_bytes,
            free_bytes_per_rank=free_bytes(device, ranks_per_node),
            accelerators=torch.cuda.device_count() if on_gpu else 0,
        )
        self._plan_kv(blueprint, shape, free_bytes(device, 1))  # too little memory is said before a weight is read
        return shape, why

    def _plan_kv(self, blueprint: Blueprint, shape: MeshShape, free: int) -> KVPlan:
        return KVPlan.make(blueprint.config, shape.tp, shape.fsdp, blueprint.dtype, self.options.engine, blueprint.max_model_len, free)

    def _load(self, weights: Mapping[str, Callable[[], Tensor]] | None) -> None:
        """Weights, KV cache, and on the leader the engine."""
        blueprint, options, device = self.blueprint, self.options, self.world.device
        if weights is None:
            self.content_hash = self._verify(blueprint)
        self.shard = shard = ModelShard(blueprint.config, self.mesh, blueprint.dtype, device)
        shard.decoder.use(self._kernels())  # before weights are packed: some are packed for them
        self.read_bytes, self.read_seconds = 0, 0.0
        if weights is None:
            self._read(blueprint, shard.load)
        else:
            shard.take(weights)
            self._pack()
        free = min(self.world.exchange("free memory", free_bytes(device, self.world.local_size)))
        plan = self._plan_kv(blueprint, self.mesh.shape, free)
        if self.is_conductor:
            self._say(plan.note)
            if plan.max_model_len < blueprint.max_model_len:
                self._say(f"sequences are limited to {plan.max_model_len:,} tokens by memory; the model takes {blueprint.max_model_len:,}")
        cache = shard.decoder.new_cache(plan.blocks, options.engine.block_size)
        self.runner = Runner(self.mesh, shard.decoder, cache, options.engine, plan.max_model_len)
        self.engine: Engine | None = None
        self.work: SharedWork | None = None
        if self.mesh.is_leader:
            self.engine = self._make_engine(plan)
            if not self.scripted:
                self.engine.resume()  # workers serve from now on
            if self.mesh.shape.replicas > 1:
                assert self.world.store is not None
                self.work = SharedWork(self.world.store, self.mesh.shape.replicas, self.world.watchdog.check)

    def _read(self, blueprint: Blueprint, load: Callable[..., LoadReport]) -> None:
        """Fill the shard by its method `load` from the blueprint's checkpoint."""
        began = time.perf_counter()
        with self._progress(blueprint, self.shard.elements, "loading") as bar:
            report = load(blueprint.checkpoint, self.options.loader, bar.update)
        self._pack()
        # The slowest rank's time counts for all.
        loads = self.world.exchange("loaded", [report.bytes_requested, time.perf_counter() - began])
        self.read_bytes, self.read_seconds = sum(load[0] for load in loads), max(load[1] for load in loads)

    def _pack(self) -> None:
        if self.options.engine.pack_weights:
            self.shard.pack()

    def _verify(self, blueprint: Blueprint) -> str | None:
        """With loader.verify=full the hash of all weights, each read and checked on one of the ranks.

        Raises:
            ValueError: A rank found damage; the same on every rank.
        """
        checkpoint, config, options = blueprint.checkpoint, blueprint.config, self.options.loader
        if options.verify != "full":
            return None
        assert checkpoint is not None
        hashes, error = {}, None
        try:
            with self._progress(blueprint, blueprint.parameters // self.world.size, "verifying") as bar:
                hashes = hash_weights(checkpoint, config, self.world.rank, self.world.size, options.threads, bar.update)
        except USER_ERRORS as mistake:
            error = str(mistake)
        found = self.world.exchange("content", [error, hashes])
        wrong = next((text for text, _ in found if text is not None), None)
        if wrong is not None:
            raise ValueError(wrong)
        return content_hash(checkpoint, config, {name: digest for _, part in found for name, digest in part.items()})

    def _swap(self, path: str) -> str | None:
        """This rank's part of a swap; returns why it is refused, the same on every rank."""
        successor, error = None, None
        try:
            self._end_prefetch(path)
            successor = self._successor(path)
        except USER_ERRORS as mistake:
            error = str(mistake)
        with self._guarded():
            wrong = next((text for text in self.world.exchange("swap", error) if text is not None), None)
            content = None
            if wrong is None:
                assert successor is not None
                try:
                    content = self._verify(successor)
                except ValueError as mistake:
                    wrong = str(mistake)
            if wrong is None:
                assert successor is not None
                self._lost = f"the weights were lost when {path} could not be loaded"
                self._read(successor, self.shard.refill)
                self._lost = None
                self.blueprint, self.options, self.content_hash = successor, successor.options, content
                if self.engine is not None:
                    self.engine.forget_prefixes()
            if self.engine is not None and not self.scripted:
                self.engine.resume()
        return wrong

    def _successor(self, path: str) -> Blueprint:
        """The blueprint with the checkpoint at `path`; all that can be known before its weights are read is checked.

        Raises:
            FileNotFoundError: The checkpoint or its configuration is not there.
            ValueError: It is damaged, or not of this architecture.
        """
        blueprint = self.blueprint
        options = replace(self.options, model=replace(self.options.model, path=path, step=None))
        checkpoint = open_checkpoint(path, options.model.dialect, config=options.model.config)
        config = checkpoint.config(options.model.config)
        for name in (item.name for item in fields(config) if item.name not in NOT_ARCHITECTURE):
            ours, theirs = getattr(blueprint.config, name), getattr(config, name)
            if ours != theirs:
                raise ValueError(f"swap to {path}: {name} is {theirs} there and {ours} in the running model; load it as a new one")
        checkpoint.match(blueprint.config)
        tokenizer = vars(blueprint).get("tokenizer", blueprint.given_tokenizer)  # the one that was read stays
        return replace(blueprint, options=options, checkpoint=checkpoint, given_tokenizer=tokenizer)

    def _end_prefetch(self, path: str) -> None:
        """End the prefetch there may be.

        Raises:
            ValueError: It was for `path`, and something went wrong in it.
        """
        ahead, self._ahead = self._ahead, None
        error = ahead.stop() if ahead is not None else None
        if ahead is not None and error is not None and ahead.path == path:
            raise ValueError(str(error)) from error

    def _check_weights(self) -> None:
        if self._lost is not None:
            raise RuntimeError(self._lost)

    def _kernels(self) -> Kernels | None:
        """The compiled kernels, if every rank has them: what all hold alike must be computed alike."""
        wanted = self.options.engine.native_kernels and self.world.device.type == "cpu"
        found = kernels(self.blueprint.dtype) if wanted else None
        return found if all(self.world.exchange("native kernels", found is not None)) else None

    def _make_engine(self, plan: KVPlan) -> Engine:
        blueprint, limits, rotary = self.blueprint, self.options.engine, self.runner.decoder.rotary
        allocators = [BlockAllocator(plan.blocks, limits.block_size, limits.prefix_cache) for _ in range(self.mesh.shape.fsdp)]
        rope = RopeRules(rotary.regime, rotary.threshold if rotary.type == "longrope" else None)
        return Engine(
            self.runner,
            Scheduler(limits, allocators, rope),
            blueprint.config.vocab_size,
            plan.max_model_len,
            blueprint.eos_ids,
            blueprint.tokenizer,
            self.options.parallel.timeout_s / 4,
        )

    def _progress(self, blueprint: Blueprint, total_elements: int, what: str) -> tqdm:
        checkpoint = blueprint.checkpoint
        assert checkpoint is not None
        size = getattr(torch, checkpoint.dtype(blueprint.config)).itemsize
        hidden = not (self.is_conductor and sys.stderr.isatty())
        return tqdm(total=total_elements * size, desc=what, unit="B", unit_scale=True, disable=hidden, leave=False)

    def _run_shared(self, requests: list[Request], sink: Sink) -> None:
        """Share `requests` with the other replicas; their results come through the store."""
        assert self.engine is not None and self.work is not None
        work, left = self.work, len(requests)
        last = time.monotonic()

        def counted(deltas: list[Delta], results: list[Result]) -> None:
            nonlocal left, last
            if time.monotonic() - last > 0.1:
                last = time.monotonic()
                results = [*results, *work.collect()]
            left -= len(results)
            sink(deltas, results)

        work.publish(requests)
        self.engine.run(work.take(), counted)
        while left:
            collected = work.collect()
            left -= len(collected)
            sink([], collected)
            if not collected:
                work.pause()

    def _end_call(self) -> None:
        """A call is over: scripted workers go back to their own program."""
        assert self.engine is not None
        if self.work is not None:
            self.work.finish()
        if self.scripted:
            self.engine.release()

    def _guarded(self) -> _Guard:
        return _Guard(self.world)

    def _leave(self, error: BaseException | None) -> None:
        """Leave the world, telling workers why when something went wrong."""
        if self._ahead is not None:
            self._ahead.stop()
        failed = error is not None or self.world.watchdog.failure is not None
        engine = getattr(self, "engine", None)
        if engine is not None and self.world.watchdog.failure is None:
            engine.close(f"{type(error).__name__}: {error}" if error is not None else None)
            if self.work is not None and self.is_conductor and not failed:
                self.work.close()
        if failed and error is not None and self.world.size > 1:
            self.world.watchdog.report(error)
        if hasattr(self, "mesh") and not failed:
            self.mesh.close()
        self.world.close(failed=failed)


class _Guard:
    """Turns whatever a rank raises into the world's first error."""

    def __init__(self, world: World) -> None:
        self.world = world

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            explained = self.world.watchdog.explain(error)
            if explained is not error:
                raise explained from error

"""A running model: this rank's part of it, from the first check to the last step."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from dist_infer.config.options import Options
from dist_infer.distributed.health import RankFailure
from dist_infer.distributed.launch import RankVariables
from dist_infer.distributed.mesh import Mesh
from dist_infer.distributed.signals import Stopped, StopSignal
from dist_infer.engine.blocks import BlockAllocator
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.engine import Delta, Engine, Sink
from dist_infer.engine.meeting import meet, plan_kv
from dist_infer.engine.memory import KVPlan, free_bytes
from dist_infer.engine.request import Request, Result
from dist_infer.engine.resident import Resident
from dist_infer.engine.runner import Runner
from dist_infer.engine.scheduler import RopeRules, Scheduler
from dist_infer.engine.shared_work import SharedWork

Record = Callable[[list[Result]], None]
COLLECT_S = 0.1  # how often the conductor asks for other replicas' results while its own works


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
        record: Called on every leader with the results its own replica finished, as they come.
        stop: Looked at between steps on every leader; once one has noticed a signal, all stop.
        last_words: Called with the failure before the watchdog ends a process that hangs.
        tolerant: A damaged checkpoint is no reason to end: see `Resident`. What the conductor says counts for all.

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
        record: Record | None = None,
        stop: StopSignal | None = None,
        last_words: Callable[[RankFailure], None] | None = None,
        tolerant: bool = False,
    ) -> None:
        alone = RankVariables.read() is None and not dist.is_initialized()
        self.scripted = scripted and not alone  # ranks that we start ourselves serve until the end
        self._say = say or (lambda line: None)
        self._record = record or (lambda results: None)
        self._stop = stop or StopSignal()
        self._closed = False
        met = meet(options, blueprint, check, alone, may_exit=not scripted, last_words=last_words, tolerant=tolerant)
        self.world, found = met.world, met.blueprint
        try:
            self.mesh = Mesh(self.world, met.shape, options.parallel)
            if self.is_conductor:
                if found.checkpoint is not None and found.checkpoint.note:
                    self._say(found.checkpoint.note)
                for warning in found.generation.warnings:
                    self._say(f"generation_config.json: {warning}")
                for line in (met.why, *self.mesh.notes):
                    self._say(line)
            self._load(found, weights, met.tolerant)
        except BaseException as error:
            self._leave(error)
            raise

    @property
    def is_conductor(self) -> bool:
        """Whether this rank owns the requests."""
        return self.world.rank == 0

    @property
    def blueprint(self) -> Blueprint:
        """Of the checkpoint that is loaded now."""
        return self.resident.blueprint

    def run(self, requests: list[Request], sink: Sink) -> None:
        """Run `requests` on all replicas (on the conductor); `sink` gets deltas of its own replica and results of all.

        Raises:
            Stopped: A leader was asked to stop; what is unfinished is forgotten.
            RankFailure: A rank failed.
        """
        assert self.engine is not None
        self.resident.check()
        with self._guarded():
            self.engine.resume()
            if self.work is None:
                self.engine.run(iter(requests), self._recorded(sink), self._stopping)
            else:
                self._run_shared(requests, sink)
            self._end_call()
        stopped_by = self._stopping()
        if stopped_by is not None:
            raise Stopped(f"stopped by {stopped_by}")

    def stream(self, request: Request) -> Iterator[Delta | Result]:
        """Run one request on the conductor's own replica, handing on every delta; ends with its result."""
        assert self.engine is not None
        self.resident.check()
        with self._guarded():
            self.engine.resume()
            if self.work is not None:
                self.work.publish([])
            try:
                refused = self.engine.submit(request)
                if refused is not None:
                    yield refused
                while self.engine.busy:
                    self._check_open()
                    deltas, results = self.engine.step()
                    yield from deltas
                    yield from results
            finally:
                if not self._closed:
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
                self.engine.run(self.work.take(), self._recorded(self._deliver), self._stopping)
                self._end_call()
                if self.scripted:
                    return
            self.engine.close()

    def swap(self, path: str) -> None:
        """Load the weights of the checkpoint at `path`, of the same architecture, over the present ones.

        Called by every rank of a script, else by the conductor alone.

        Raises:
            ValueError: Requests are running, or the checkpoint cannot be used. The present weights stay in use, unless damage was found
                when they were overwritten already: then another swap must come before anything is run.
            RankFailure: A rank failed.
        """
        self._check_open()
        if self.engine is not None and self.engine.busy:
            raise ValueError(f"swap to {path}: a request is still running; finish or close its stream first")
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
        self._check_open()
        self.resident.prefetch(path, whole=not self.scripted)

    def close(self, error: BaseException | None = None) -> None:
        """End the session; every rank calls this. With `error` the workers leave with it."""
        self._leave(error)

    def _load(self, blueprint: Blueprint, weights: Mapping[str, Callable[[], Tensor]] | None, tolerant: bool) -> None:
        """Weights, KV cache, and on the leader the engine."""
        options, device = blueprint.options, self.world.device
        self.resident = Resident(blueprint, self.world, self.mesh, weights, tolerant)
        decoder = self.resident.shard.decoder
        free = min(self.world.exchange("free memory", free_bytes(device, self.world.sharing)))
        plan = plan_kv(blueprint, self.mesh.shape, free)
        if self.is_conductor:
            self._say(plan.note)
            if plan.max_model_len < blueprint.max_model_len:
                self._say(f"sequences are limited to {plan.max_model_len:,} tokens by memory; the model takes {blueprint.max_model_len:,}")
        cache = decoder.new_cache(plan.blocks, options.engine.block_size)
        self.runner = Runner(self.mesh, decoder, cache, options.engine, plan.max_model_len)
        self.engine: Engine | None = None
        self.work: SharedWork | None = None
        if self.mesh.is_leader:
            self.engine = self._make_engine(blueprint, plan)
            if not self.scripted:
                self.engine.resume()  # workers serve from now on
            if self.mesh.shape.replicas > 1:
                assert self.world.store is not None
                self.work = SharedWork(self.world.store, self.mesh.shape.replicas, self.world.watchdog.check)

    def _swap(self, path: str) -> str | None:
        """This rank's part of a swap; returns why it is refused, the same on every rank."""
        with self._guarded():
            wrong = self.resident.swap(path)
            if self.engine is not None:
                self.engine.forget_prefixes()
                if not self.scripted:
                    self.engine.resume()
        return wrong

    def _make_engine(self, blueprint: Blueprint, plan: KVPlan) -> Engine:
        limits, rotary = blueprint.options.engine, self.runner.decoder.rotary
        allocators = [BlockAllocator(plan.blocks, limits.block_size, limits.prefix_cache) for _ in range(self.mesh.shape.fsdp)]
        rope = RopeRules(rotary.regime, rotary.threshold if rotary.type == "longrope" else None)
        return Engine(
            self.runner,
            Scheduler(limits, allocators, rope),
            blueprint.config.vocab_size,
            plan.max_model_len,
            blueprint.eos_ids,
            blueprint.tokenizer,
            blueprint.options.parallel.timeout_s / 4,
            limits.overlap if limits.overlap is not None else self.world.device.type == "cuda",
        )

    def _recorded(self, sink: Sink) -> Sink:
        """`sink`, and the record of this replica's results before it."""

        def both(deltas: list[Delta], results: list[Result]) -> None:
            if results:
                self._record(results)
            sink(deltas, results)

        return both

    def _deliver(self, deltas: list[Delta], results: list[Result]) -> None:
        """Hand results to the conductor (on other leaders)."""
        assert self.work is not None
        self.work.deliver(results)

    def _stopping(self) -> str | None:
        """The signal that some leader has noticed, if one has."""
        return self.work.stopping(self._stop.name) if self.work is not None else self._stop.name

    def _run_shared(self, requests: list[Request], sink: Sink) -> None:
        """Share `requests` with the other replicas; their results come through the store."""
        assert self.engine is not None and self.work is not None
        work, left = self.work, len(requests)
        last = time.monotonic()

        def counted(deltas: list[Delta], results: list[Result]) -> None:
            nonlocal left, last
            if results:
                self._record(results)
            if time.monotonic() - last > COLLECT_S:
                last = time.monotonic()
                results = [*results, *work.collect()]
            left -= len(results)
            sink(deltas, results)

        work.publish(requests)
        self.engine.run(work.take(), counted, self._stopping)
        while left and self._stopping() is None:
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

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Turns what is raised inside into the world's first error."""
        self._check_open()
        try:
            yield
        except Exception as error:
            explained = self.world.watchdog.explain(error)
            if explained is error:
                raise
            raise explained from error

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the model is closed: its ranks are gone, and its memory is free again")

    def _leave(self, error: BaseException | None) -> None:
        """Leave the world, telling workers why when something went wrong; once."""
        if self._closed:
            return
        self._closed = True
        failed = error is not None or self.world.watchdog.failure is not None
        engine = getattr(self, "engine", None)
        if engine is not None and self.world.watchdog.failure is None:
            engine.close(f"{type(error).__name__}: {error}" if error is not None else None)
            if self.work is not None and self.is_conductor and not failed:
                self.work.close()
        if failed and error is not None and self.world.size > 1:
            self.world.watchdog.report(error)
        if hasattr(self, "runner"):
            self.runner.close()  # before process groups end: NCCL waits for graphs that hold its sums
        if hasattr(self, "resident"):
            self.resident.close()
        if self.world.device.type == "cuda" and not failed:
            torch.cuda.empty_cache()  # others may want the memory
        if hasattr(self, "mesh") and not failed:
            self.mesh.close()
        self.world.close(failed=failed)

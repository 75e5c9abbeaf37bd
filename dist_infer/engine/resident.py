"""The model whose weights this rank holds: loaded, swapped for others, the next ones prefetched."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dist_infer.checkpoint.checkpoint import open_checkpoint
from dist_infer.checkpoint.content import content_hash, hash_weights
from dist_infer.checkpoint.plan import Read, plan
from dist_infer.checkpoint.prefetch import Prefetch
from dist_infer.checkpoint.reader import LoadReport
from dist_infer.checkpoint.shard import ModelShard
from dist_infer.distributed.logs import console
from dist_infer.distributed.mesh import Mesh
from dist_infer.distributed.world import World
from dist_infer.engine.blueprint import Blueprint
from dist_infer.model.cuda_probe import kernels_start
from dist_infer.model.native import Kernels, kernels
from dist_infer.model.weights import describe

NOT_ARCHITECTURE = ("dtype", "bos_token_id", "eos_token_ids")  # fields of ModelConfig that a swap may change


class Resident:
    """This rank's shard and the checkpoint it is filled from; every rank makes one at the same time.

    Attributes:
        blueprint: Of what is loaded now.
        shard: The weights.
        content_hash: Hash of all weights, with loader.verify=full.
        loads: How often weights were read.
        lost: Why there are no weights, if there are none.
        read_bytes, read_seconds: What the last load cost all ranks together, and the slowest.

    Args:
        blueprint: What to load.
        world, mesh: Where this rank stands.
        weights: Whole tensors in memory, by canonical name, instead of a checkpoint.
        tolerant: Damage found in reading is told by `check`, and another checkpoint may be swapped in; else it is raised.

    Raises:
        ValueError: The checkpoint is damaged; the same on every rank.
        RankFailure: Another rank failed.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        world: World,
        mesh: Mesh,
        weights: Mapping[str, Callable[[], Tensor]] | None = None,
        tolerant: bool = False,
    ) -> None:
        self.blueprint, self._world, self._mesh = blueprint, world, mesh
        self.content_hash = self._verify(blueprint) if weights is None else None
        self.shard = ModelShard(blueprint.config, mesh, blueprint.dtype, world.device)
        self.shard.decoder.use(self._kernels())  # before weights are packed: some are packed for them
        self.loads, self.read_bytes, self.read_seconds = 0, 0, 0.0
        self._ahead: Prefetch | None = None
        self.lost: str | None = None
        if weights is None:
            try:
                self._read(blueprint, self.shard.load)
            except ValueError as mistake:
                if not tolerant:
                    raise
                self.lost = str(mistake)
        else:
            self.shard.take(weights)
            self._pack()

    def check(self) -> None:
        """Raise RuntimeError if the weights were lost in a swap."""
        if self.lost is not None:
            raise RuntimeError(self.lost)

    def swap(self, path: str) -> str | None:
        """Load the checkpoint at `path`, of the same architecture, over the present weights; every rank calls this.

        Returns:
            Why it failed, the same on every rank; None when it is done. The present weights stay in use, unless damage was found
            only when they were overwritten: then there are none (see `check`) until another swap.
        """
        successor, error = None, None
        try:
            self._end_prefetch(path)
            successor = self.successor(path)
        except (ValueError, OSError) as mistake:
            error = str(mistake)
        wrong = next((text for text in self._world.exchange("swap", error) if text is not None), None)
        if wrong is not None:
            return wrong
        assert successor is not None
        try:
            content = self._verify(successor)
        except ValueError as mistake:
            return str(mistake)
        self.lost = f"the weights were lost when {path} could not be loaded"
        try:
            self._read(successor, self.shard.refill)
        except ValueError as mistake:
            return str(mistake)
        self.lost = None
        self.blueprint, self.content_hash = successor, content
        return None

    def successor(self, path: str) -> Blueprint:
        """The blueprint with the checkpoint at `path`; all that can be known before its weights are read is checked.

        Raises:
            FileNotFoundError: The checkpoint or its configuration is not there.
            ValueError: It is damaged, or not of this architecture.
        """
        return succeed(self.blueprint, path)

    def prefetch(self, path: str, whole: bool) -> None:
        """Bring what a later `swap` to `path` reads into the page cache, in the background; errors are kept for the swap.

        Args:
            path: The checkpoint.
            whole: Read for all ranks of this host, not for this one alone.
        """
        self.end_prefetch()
        shape, at = self._mesh.shape, self._mesh.coordinates

        def reads() -> tuple[Path, list[Read]]:
            successor = self.successor(path)
            checkpoint, config = successor.checkpoint, successor.config
            assert checkpoint is not None
            weights, fsdp, coordinate = (list(describe(config)), 1, 0) if whole else (self.shard.weights, shape.fsdp, at.fsdp)
            return checkpoint.source.root, plan(weights, fsdp, coordinate, checkpoint.index, checkpoint.dialect, config)

        self._ahead = Prefetch(os.path.abspath(path) if os.path.exists(path) else path, reads)

    def close(self) -> None:
        """Let go of the weights."""
        self.end_prefetch()
        if hasattr(self, "shard"):
            del self.shard

    def end_prefetch(self) -> None:
        """End the prefetch there may be."""
        if self._ahead is not None:
            self._ahead.stop()
            self._ahead = None

    def _end_prefetch(self, path: str) -> None:
        """End the prefetch there may be.

        Raises:
            ValueError: It was for `path`, and something went wrong in it.
        """
        ahead, self._ahead = self._ahead, None
        error = ahead.stop() if ahead is not None else None
        if ahead is not None and error is not None and ahead.path == path:
            raise ValueError(str(error)) from error

    def _read(self, blueprint: Blueprint, load: Callable[..., LoadReport]) -> None:
        """Fill the shard by its method `load` from the blueprint's checkpoint.

        Raises:
            ValueError: A rank found damage; the same on every rank.
        """
        began, requested, error = time.perf_counter(), 0, None
        with self._progress(blueprint, self.shard.elements, "loading") as bar:
            try:
                requested = load(blueprint.checkpoint, blueprint.options.loader, bar.update).bytes_requested
                self._pack()
            except (ValueError, OSError) as mistake:
                error = str(mistake)
        loads = self._world.exchange("loaded", [error, requested, time.perf_counter() - began])
        wrong = next((text for text, _, _ in loads if text is not None), None)
        if wrong is not None:
            raise ValueError(wrong)
        self.loads += 1
        self.read_bytes, self.read_seconds = sum(load[1] for load in loads), max(load[2] for load in loads)  # the slowest counts

    def _pack(self) -> None:
        if self.blueprint.options.engine.pack_weights:
            self.shard.pack()

    def _verify(self, blueprint: Blueprint) -> str | None:
        """With loader.verify=full the hash of all weights, each read and checked on one of the ranks.

        Raises:
            ValueError: A rank found damage; the same on every rank.
        """
        checkpoint, config, options, world = blueprint.checkpoint, blueprint.config, blueprint.options.loader, self._world
        if options.verify != "full":
            return None
        assert checkpoint is not None
        hashes, error = {}, None
        try:
            with self._progress(blueprint, blueprint.parameters // world.size, "verifying") as bar:
                hashes = hash_weights(checkpoint, config, world.rank, world.size, options.threads, bar.update)
        except (ValueError, OSError) as mistake:
            error = str(mistake)
        found = world.exchange("content", [error, hashes])
        wrong = next((text for text, _ in found if text is not None), None)
        if wrong is not None:
            raise ValueError(wrong)
        return content_hash(checkpoint, config, {name: digest for _, part in found for name, digest in part.items()})

    def _kernels(self) -> Kernels | None:
        """The compiled kernels, if every rank has them: what all hold alike must be computed alike."""
        options, dtype = self.blueprint.options.engine, self.blueprint.dtype
        found = None
        if options.native_kernels and self._world.device.type == "cpu":
            found = kernels(dtype)
        elif options.native_kernels and kernels_start():
            from dist_infer.model.cuda_kernels import CudaKernels  # as `kernels_start` has it

            found = CudaKernels(self._world.device)
        return found if all(self._world.exchange("native kernels", found is not None)) else None

    def _progress(self, blueprint: Blueprint, total_elements: int, what: str) -> tqdm:
        checkpoint = blueprint.checkpoint
        assert checkpoint is not None
        size = getattr(torch, checkpoint.dtype(blueprint.config)).itemsize
        hidden = not (self._world.rank == 0 and console().isatty())
        return tqdm(total=total_elements * size, desc=what, unit="B", unit_scale=True, disable=hidden, leave=False, file=console())


def succeed(blueprint: Blueprint, path: str) -> Blueprint:
    """`blueprint` with the checkpoint at `path` instead of its own, of the same architecture.

    Raises:
        FileNotFoundError: The checkpoint or its configuration is not there.
        ValueError: It is damaged, or not of this architecture.
    """
    options = replace(blueprint.options, model=replace(blueprint.options.model, path=path, step=None))
    checkpoint = open_checkpoint(path, options.model.dialect, config=options.model.config)
    config = checkpoint.config(options.model.config)
    for name in (item.name for item in fields(config) if item.name not in NOT_ARCHITECTURE):
        ours, theirs = getattr(blueprint.config, name), getattr(config, name)
        if ours != theirs:
            raise ValueError(f"swap to {path}: {name} is {theirs} there and {ours} in the running model; load it as a new one")
    checkpoint.match(blueprint.config)
    tokenizer = vars(blueprint).get("tokenizer", blueprint.given_tokenizer)  # the one that was read stays
    return replace(blueprint, options=options, checkpoint=checkpoint, given_tokenizer=tokenizer)

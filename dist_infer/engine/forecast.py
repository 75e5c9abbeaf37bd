"""What a model, a cluster and a workload make of each other, mesh by mesh; arithmetic alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dist_infer.config.options import Options
from dist_infer.distributed.mesh import MeshShape
from dist_infer.engine.cluster import Cluster
from dist_infer.engine.footprint import Footprint, TensorCut
from dist_infer.engine.step_time import Spans, StepTime
from dist_infer.engine.traffic import Collective, collectives
from dist_infer.model.config import ModelConfig
from dist_infer.model.weights import describe
from dist_infer.sampling.slots import SlotParams

LIMITS = {
    "products": "the projections' products",
    "attention": "attention",
    "reductions": "all-reduces over tp",
    "gathers": "gathers of weights over fsdp",
    "host": "the fixed time of layers and steps",
}


@dataclass(frozen=True)
class Forecast:
    """One mesh.

    Attributes:
        shape: Ranks along each axis.
        ranks_per_node: Ranks of a machine.
        footprint: Memory of a rank; the rest means something only if nothing is missing there.
        kv_tokens: Tokens that all KV caches hold together.
        running: Sequences that run at once, over all replicas.
        prefill: Prompt tokens/s of all ranks together, while prompts are read.
        decode: Output tokens/s of all ranks together, half-way through the outputs; 0 when there are none.
        prefill_step: The largest step while prompts are read.
        decode_step: A step half-way through the outputs.
        first_token_s: Of a prompt that is alone.
        load_s: From the files to weights in place, in memory that is at hand.
        fresh_s: What that takes longer where a hypervisor must give the memory first.
        seconds: The whole workload, loading aside.
        traffic: Collectives of a decode step, or where there are none, of a prefill step.
        why: What limits it, in a sentence.
    """

    shape: MeshShape
    ranks_per_node: int
    footprint: Footprint
    kv_tokens: int
    running: int
    prefill: float
    decode: float
    prefill_step: StepTime
    decode_step: StepTime
    first_token_s: float
    load_s: float
    fresh_s: float
    seconds: float
    traffic: tuple[Collective, ...]
    why: str

    @property
    def fits(self) -> bool:
        """Whether a rank's memory suffices."""
        return not self.footprint.missing

    def to_json(self) -> dict[str, Any]:
        """Every figure."""
        values = asdict(self)
        values["footprint"] = {**self.footprint.parts, "total": self.footprint.total, "missing": self.footprint.missing}
        if not self.fits:
            return {key: values[key] for key in ("shape", "ranks_per_node", "footprint", "why")}
        return values


class Planner:
    """Forecasts of one model on one cluster.

    Args:
        config: The model.
        dtype: Type of weights and KV cache.
        cluster: Where it runs.
        options: Limits of the engine, sampling, axes that are given, and the workload.
        stored_bytes: Bytes of a weight's element in the checkpoint.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, cluster: Cluster, options: Options, stored_bytes: int) -> None:
        self.config, self.dtype, self.cluster, self.options = config, dtype, cluster, options
        self.stored = stored_bytes * sum(weight.elements for weight in describe(config))
        self.params = SlotParams.of(options.sampling, seed=0)
        self.overlap = options.engine.overlap if options.engine.overlap is not None else cluster.kind == "cuda"
        self._cuts: dict[int, TensorCut] = {}

    def forecasts(self) -> list[Forecast]:
        """All sensible meshes, best first: by the time the workload takes; those that do not fit last, the nearest to it first.

        Raises:
            ValueError: There is none with the axes that are given.
        """
        found = [self.forecast(shape, world) for world in self.cluster.worlds for shape in self._shapes(world)]
        if not found:
            given = self.options.parallel
            axes = " x ".join(f"{n}={v}" for n in ("replicas", "fsdp", "tp") if (v := getattr(given, n)) is not None)
            worlds = " or ".join(map(str, self.cluster.worlds))
            raise ValueError(f"parallel: {axes or 'any mesh'}: no mesh of {worlds} ranks for a model of {self.config.heads} query heads")
        return sorted(found, key=lambda one: (one.footprint.missing, one.seconds, one.shape.size, one.shape.tp))

    def forecast(self, shape: MeshShape, world: int) -> Forecast:
        """One mesh of `world` ranks."""
        held, options, work, cluster = self._cut(shape.tp), self.options, self.options.workload, self.cluster
        per_node = -(-world // cluster.nodes)
        memory = cluster.memory * cluster.devices // per_node
        longest = work.prompt_tokens + work.output_tokens
        limit = options.engine.max_model_len or self.config.longest
        footprint = Footprint.of(held, shape, self.dtype, options.engine, cluster, memory, max(limit, 2), longest)
        nothing = StepTime(0, 0, 0, 0, 0, False)
        if footprint.missing:
            return Forecast(shape, per_node, footprint, 0, 0, 0, 0, nothing, nothing, 0, 0, 0, math.inf, (), footprint.why)
        coordinates = shape.replicas * shape.fsdp
        tokens = footprint.tokens(options.engine, shape.fsdp)
        queued = -(-work.sequences // coordinates)
        running = max(1, min(queued, options.engine.max_sequences, tokens // shape.fsdp // longest))
        read_s, largest = self._read(held, shape, per_node, running)
        rate = running * work.prompt_tokens / read_s
        decode_step, traffic, per_batch = nothing, self._traffic(held, shape, [largest]), read_s
        if work.output_tokens:
            spans = [Spans(running, 1, work.prompt_tokens + -(-work.output_tokens // 2))]
            traffic = self._traffic(held, shape, spans)
            decode_step = self._time(held, shape, per_node, spans)
            per_batch += (work.output_tokens - 1) * decode_step.total
        # The last batch of a queue that does not share out evenly is taken for a full one's part.
        seconds = queued / running * per_batch
        used = min(coordinates, work.sequences)
        prefill_step = self._time(held, shape, per_node, [largest])
        return Forecast(
            shape=shape,
            ranks_per_node=per_node,
            footprint=footprint,
            kv_tokens=tokens * shape.replicas,
            running=min(running * coordinates, work.sequences),
            prefill=rate * used,
            decode=running * used / decode_step.total if work.output_tokens else 0.0,
            prefill_step=prefill_step,
            decode_step=decode_step,
            first_token_s=self._read(held, shape, per_node, 1)[0],
            load_s=self._load(shape, per_node, footprint.copies),
            fresh_s=per_node * (footprint.weights + footprint.copies) / cluster.fresh,
            seconds=seconds,
            traffic=tuple(traffic),
            why=self._why(prefill_step, decode_step, read_s, per_batch, running < min(queued, options.engine.max_sequences)),
        )

    def _shapes(self, world: int) -> Iterator[MeshShape]:
        """The meshes of `world` ranks: tp inside a node, or over whole ones; axes that are given stay."""
        given, per_node = self.options.parallel, world // self.cluster.nodes
        for tp in (size for size in range(1, world + 1) if world % size == 0):
            inside = per_node % tp == 0 or tp % per_node == 0
            if tp > self.config.heads or given.tp not in (tp, None) or not (inside or given.tp) or not self._can_cut(tp):
                continue
            for fsdp in (size for size in range(1, world // tp + 1) if world // tp % size == 0):
                replicas = world // tp // fsdp
                if given.fsdp in (fsdp, None) and given.replicas in (replicas, None):
                    yield MeshShape(replicas, fsdp, tp)

    def _can_cut(self, tp: int) -> bool:
        try:
            self._cut(tp)
        except ValueError:  # transformers' own modules want tp to divide their heads
            return False
        return True

    def _cut(self, tp: int) -> TensorCut:
        if tp not in self._cuts:
            self._cuts[tp] = TensorCut.of(self.config, tp)
        return self._cuts[tp]

    def _read(self, held: TensorCut, shape: MeshShape, per_node: int, prompts: int) -> tuple[float, Spans]:
        """Seconds in which a coordinate reads `prompts` prompts, and the spans of the largest step of that."""
        work, budget = self.options.workload, self.options.engine.max_batch_tokens
        length = work.prompt_tokens
        if length > budget:
            chunks = [Spans(1, min(budget, length - start), min(start + budget, length)) for start in range(0, length, budget)]
            return prompts * sum(self._time(held, shape, per_node, [chunk]).total for chunk in chunks), chunks[-2]
        together = Spans(min(prompts, max(1, budget // length)), length, length)
        return self._time(held, shape, per_node, [together]).total * prompts / together.count, together

    def _traffic(self, held: TensorCut, shape: MeshShape, spans: list[Spans]) -> list[Collective]:
        lengths = [part.length for part in spans for _ in range(part.count)]
        return collectives(held, shape, self.dtype, lengths, self.params, not self.options.workload.output_tokens, self.overlap)

    def _time(self, held: TensorCut, shape: MeshShape, per_node: int, spans: list[Spans]) -> StepTime:
        traffic = self._traffic(held, shape, spans)
        return StepTime.of(held, shape, self.dtype, self.cluster, per_node, spans, traffic, self.overlap)

    def _load(self, shape: MeshShape, per_node: int, kept_twice: int) -> float:
        """Every rank reads what it holds, so a machine reads what its ranks hold; replicas on it read the same from its page cache.

        The `kept_twice` bytes of each rank need memory of their own, and memory is most of what loading from a page cache costs.
        """
        replica = shape.fsdp * shape.tp
        part = self.stored * min(1.0, per_node / replica)
        copies = max(1, per_node // replica)
        packed = 0 if shape.fsdp > 1 else part * copies / self.cluster.packing
        into_memory = copies if self.cluster.kind == "cpu" else 1  # GPUs are filled beside each other
        rate = self.cluster.storage if replica == 1 else self.cluster.cut_storage
        return (part * into_memory + kept_twice * per_node) / rate + packed

    def _why(self, prefill: StepTime, decode: StepTime, read_s: float, whole_s: float, crowded: bool) -> str:
        """What most of the time goes to."""
        reading = read_s > whole_s / 2
        step, phase = (prefill, "prefill") if reading else (decode, "decode")
        parts = {name: getattr(step, name) for name in LIMITS}
        most = max(parts, key=lambda name: parts[name])
        what = LIMITS[most]
        if most == "products":
            what = "arithmetic of the projections" if step.arithmetic else "reading the weights"
        sentence = f"{parts[most] / step.total:.0%} of a {phase} step is {what}"
        return sentence + ("; the KV cache holds no more sequences" if crowded else "")

"""What every rank does with a step: compute its spans, and summarize its slice of the wanted logits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_infer.config.engine import EngineOptions
from dist_infer.distributed.collectives import Communicator
from dist_infer.distributed.mesh import Mesh
from dist_infer.engine.step import DECIDED, Kind, SpanOfStep, Step
from dist_infer.model.batch import Batch, TokenSpan
from dist_infer.model.cache import KVCache
from dist_infer.model.cuda_graphs import DecodeGraphs, decode_graphs
from dist_infer.model.decoder import LOGIT_ROWS, Decoder
from dist_infer.model.fallback.decoder import FallbackDecoder
from dist_infer.model.transfer import to_device
from dist_infer.model.weights import cut
from dist_infer.sampling.settled import settle
from dist_infer.sampling.slots import Rows, SlotParams, SlotTable
from dist_infer.sampling.summary import HeldRows, SummaryLayout, summarize

# A step that does not fit is sent in two parts; decode steps of a few hundred sequences do.
FIRST_PART = 4096


@dataclass(frozen=True)
class Answer:
    """What a rank tells the leader; of the same shape on all ranks of a replica.

    Attributes:
        values: float32 CPU tensor: the summaries [rows, width] of a step, with as many rows as the fsdp coordinate with most has; or
            full logits [rows, 2, vocabulary], processed and raw.
        layout: Which numbers a summary holds; None of full logits.
    """

    values: Tensor
    layout: SummaryLayout | None


@dataclass(frozen=True)
class Work:
    """A step made ready on one rank: all of it but the tokens that the step before decides.

    Attributes:
        spans: This rank's.
        batch: The same for the model.
        rows: Their wanted rows.
        layout: Which numbers each row's summary holds; None when no logits are wanted of any rank.
        most_rows: Rows of the fsdp coordinate that has most.
        awaiting: Of the tokens not known yet, their places in the batch and their slots.
        settles: Whether the ranks find out by themselves what it decides.
    """

    spans: list[SpanOfStep]
    batch: Batch
    rows: Rows
    layout: SummaryLayout | None
    most_rows: int
    awaiting: tuple[Tensor, list[int]] | None
    settles: bool


@dataclass(frozen=True)
class Launched:
    """A step that is being computed.

    Attributes:
        answer: Its answer, when it is there.
        ready: The event that says so; None: it is.
        settles: As that of its `Work`.
    """

    answer: Answer
    ready: torch.cuda.Event | None
    settles: bool

    def wait(self, ranks: Communicator) -> Answer:
        """The answer, once it is there; `ranks` are those that the GPU may be waiting for."""
        if self.ready is not None:
            ranks.wait_for(self.ready)
        return self.answer


class Runner:
    """One rank's shard of the model and of the KV cache, driven by steps.

    Args:
        mesh: Where this rank stands.
        decoder: Its shard of the model.
        cache: Its KV blocks.
        options: Limits; tables are sized by them.
        max_model_len: Longest sequence.
    """

    def __init__(self, mesh: Mesh, decoder: Decoder | FallbackDecoder, cache: KVCache, options: EngineOptions, max_model_len: int) -> None:
        self.mesh, self.decoder, self.cache = mesh, decoder, cache
        self.device = cache.keys[0].device
        # Kernels are started on the device of the thread that calls, which may be any.
        self._on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        self.coordinate = mesh.coordinates.fsdp
        slots = options.max_sequences * mesh.shape.fsdp
        first, stop = decoder.vocabulary
        self.largest_slice = cut(decoder.config.vocab_size, mesh.shape.tp, 0)[1]
        self.table = SlotTable(slots, first, stop - first, self.device)
        self.params: list[SlotParams | None] = [None] * slots
        self.owners = [0] * slots
        self.known = [0] * slots
        self.rope_anchors = np.zeros(slots, dtype=np.int64)
        self.blocks = np.zeros((slots, -(-max_model_len // cache.block_size)), dtype=np.int32)
        graphs = None
        if options.cuda_graphs and mesh.shape.fsdp == 1:
            graphs = decode_graphs(decoder, mesh.tp, cache, options.max_sequences, max_model_len)
        self._forward = graphs or decoder
        self._held: list[HeldRows] = []
        self._planned: Work | None = None
        self._launched: Launched | None = None
        self._settled = torch.zeros(slots, dtype=torch.long, device=self.device)  # by slot, tokens that steps have settled

    def receive(self) -> Step:
        """The leader's next step."""
        words = torch.empty(FIRST_PART, dtype=torch.int32)
        self.mesh.control.broadcast(words)
        length = int(words[1])
        if length > FIRST_PART:
            rest = torch.empty(length - FIRST_PART, dtype=torch.int32)
            self.mesh.control.broadcast(rest)
            words = torch.cat((words, rest))
        return Step.decode(words.numpy())

    def send(self, step: np.ndarray) -> None:
        """Send an encoded step to the workers (on the leader)."""
        if self.mesh.control.size == 1:
            return
        words = torch.from_numpy(step)
        first = torch.zeros(FIRST_PART, dtype=torch.int32)
        first[: len(words)] = words[:FIRST_PART]
        self.mesh.control.broadcast(first)
        if len(words) > FIRST_PART:
            self.mesh.control.broadcast(words[FIRST_PART:].clone())

    def follow(self, swap: Callable[[str], object]) -> bool:
        """Do as the leader says (on a worker) until it releases this rank (True) or stops for good (False).

        Args:
            swap: Loads the weights of the checkpoint at a path.

        Raises:
            RuntimeError: The leader failed.
        """
        while True:
            step = self.receive()
            if step.kind == Kind.ERROR:
                raise RuntimeError(f"the leader failed: {step.message}")
            if step.kind in (Kind.RELEASE, Kind.STOP):
                return step.kind == Kind.RELEASE
            if step.kind == Kind.SWAP:
                swap(step.message)
            answer = self.execute(step)
            if answer is not None:
                self.mesh.control.gather(answer.values)

    @torch.no_grad()
    def execute(self, step: Step) -> Answer | None:
        """Do what `step` says as far as it is to be computed; returns what the leader is to be told now, if anything."""
        with self._on_device:
            if step.kind == Kind.RUN:
                self._launch(self._prepare(step), [])
                return self._answer()
            if step.kind == Kind.PLAN:
                self._planned = self._prepare(step) if step.spans else self._apply(step)
                return self._answer()
            if step.kind == Kind.CONTINUE:
                work, before = self._prepare(step), self._launched
                self._launch(work, None)
                return before.wait(self.mesh.control) if before is not None else None
            if step.kind == Kind.LAUNCH:
                assert self._planned is not None, "a launch without a plan"
                self._launch(self._planned, step.decided)
                self._planned = None
            if step.kind == Kind.RESOLVE:
                return self._full_rows(step.resolves)
        return None

    @property
    def knows(self) -> bool:
        """Whether this rank knows, on its device, all tokens that the step being computed decides: the next one may be sent to continue."""
        return self._launched is None or self._launched.settles

    def close(self) -> None:
        """Let go of the model, its cache, what is kept of the last steps, and recorded ones."""
        if isinstance(self._forward, DecodeGraphs):
            self._forward.close()
        self._held, self._planned, self._launched = [], None, None
        del self._forward, self.decoder, self.cache, self.table, self._settled

    def _prepare(self, step: Step) -> Work:
        """Make `step` ready, whose missing tokens may follow."""
        self._apply(step)
        spans = [span for span in step.spans if self.owners[span.slot] == self.coordinate]
        rows = [0] * self.mesh.shape.fsdp
        params: list[SlotParams] = []
        targets = False
        for span in step.spans:
            if span.rows:
                rows[self.owners[span.slot]] += span.rows
                targets |= bool(span.targets)
                slot_params = self.params[span.slot]
                assert slot_params is not None
                params.append(slot_params)
        layout = SummaryLayout.for_rows(params, targets) if params else None
        settles = step.kind != Kind.RUN and (layout is None or layout.settled) and not any(p.needs_tokens for p in params)
        entering = [
            TokenSpan(span.tokens, span.start, self.blocks[span.slot], span.rows, int(self.rope_anchors[span.slot])) for span in spans
        ]
        batch = Batch.of(entering, self.cache.block_size, self.decoder.rotary, self.device)
        return Work(spans, batch, _rows(spans), layout, max(rows), self._awaiting(spans), settles)

    def _awaiting(self, spans: list[SpanOfStep]) -> tuple[Tensor, list[int]] | None:
        """Places in the batch, and slots, of the tokens that are not known yet."""
        places, slots, end = [], [], 0
        for span in spans:
            end += len(span.tokens)
            if span.tokens[-1] == DECIDED:
                places.append(end - 1)
                slots.append(span.slot)
        return (to_device(places, self.device), slots) if slots else None

    def _launch(self, work: Work, decided: list[int] | None) -> None:
        """Begin to compute `work`; `decided` has by slot the tokens that it misses, unless they are settled."""
        if work.awaiting is not None:
            places, slots = work.awaiting
            if decided is None:
                tokens = self._settled[to_device(slots, self.device)]
            else:
                tokens = to_device([decided[slot] for slot in slots], self.device)
            work.batch.tokens.index_copy_(0, places, tokens)
        self._count(work.spans, decided)
        layout, rows = work.layout, work.rows
        self._launched, self._held = None, []
        summaries: list[Tensor] = []

        def reduce(logits: Tensor, first: int) -> None:
            assert layout is not None
            part = slice(first, first + len(logits))
            targets = None if rows.targets is None else rows.targets[part]
            summary, held = summarize(logits, layout, Rows(rows.slots[part], rows.positions[part], targets), self.table)
            summaries.append(summary)
            if layout.noised > 1:  # some row filters: the leader may come back for it
                self._held.append(held)

        self._forward(work.batch, self.cache, reduce)
        if layout is not None:
            missing = work.most_rows - len(rows)
            if missing or len(summaries) != 1:
                summaries = [torch.cat([*summaries, torch.zeros(missing, layout.width, device=self.device)])]
            if work.settles and any(map(rows.sampled, range(len(rows)))):
                self._settle(summaries[0][: len(rows)], layout, rows)
            values = summaries[0].to("cpu", non_blocking=True)
            ready = None
            if self.device.type == "cuda":
                ready = torch.cuda.Event()
                ready.record()
            self._launched = Launched(Answer(values, layout), ready, work.settles)

    def _settle(self, summaries: Tensor, layout: SummaryLayout, rows: Rows) -> None:
        """Find out what `rows` decide, for the step after theirs."""
        drawn = to_device([[not self.table[slot].greedy] for slot in rows.slots], self.device) if layout.noised else None
        tokens = settle(summaries, layout, drawn, self.mesh.tp, self.decoder.config.vocab_size)
        self._settled.index_copy_(0, to_device(rows.slots, self.device), tokens)

    def _answer(self) -> Answer | None:
        """The answer of the step that was launched last, once it is there; None when no logits are wanted of it."""
        launched, self._launched = self._launched, None
        return launched.wait(self.mesh.control) if launched is not None else None

    def _apply(self, step: Step) -> None:
        """Bring the tables up to date."""
        for slot in step.frees:
            if self.owners[slot] == self.coordinate:
                self.table.free(slot)
        for a in step.admissions:
            self.owners[a.slot], self.known[a.slot], self.params[a.slot] = a.owner, a.known, a.params
            self.rope_anchors[a.slot] = a.rope_anchor
            if a.owner == self.coordinate:
                prompt = a.params.prompt_len
                self.table.admit(a.slot, a.params, a.tokens[:prompt], a.tokens[prompt:])
        for t in step.tables:
            self.blocks[t.slot, t.first : t.first + len(t.blocks)] = t.blocks
        copies = [(source, target) for owner, source, target in step.copies if owner == self.coordinate]
        if copies:
            sources, targets = to_device(copies, self.device).T
            self.cache.copy_blocks(sources, targets)

    def _count(self, spans: list[SpanOfStep], decided: list[int] | None) -> None:
        """Let the slot table count the tokens decided since admission; nobody counts those that are settled."""
        produced = [span for span in spans if span.start + len(span.tokens) > self.known[span.slot]]
        if decided is None:
            produced = [span for span in produced if span.tokens[-1] != DECIDED]
        tokens = [decided[span.slot] if decided and span.tokens[-1] == DECIDED else span.tokens[-1] for span in produced]
        self.table.append([span.slot for span in produced], tokens)

    def _full_rows(self, resolves: list[tuple[int, int]]) -> Answer:
        """The held logits of those of the given rows (owner, row) that are this rank's."""
        owners = [owner for owner, _ in resolves]
        values = torch.zeros(max(map(owners.count, set(owners))), 2, self.largest_slice)
        mine = [row for owner, row in resolves if owner == self.coordinate]
        for place, row in enumerate(mine):
            held = self._held[row // LOGIT_ROWS].take([row % LOGIT_ROWS], self.largest_slice)[0].to("cpu")
            values[place, : len(held)] = held
        return Answer(values, None)


def _rows(spans: list[SpanOfStep]) -> Rows:
    """The wanted rows of `spans`, in order."""
    slots, positions, targets = [], [], []
    for span in spans:
        end = span.start + len(span.tokens)
        slots += [span.slot] * span.rows
        positions += range(end + 1 - span.rows, end + 1)
        targets += span.targets or [-1] * span.rows
    return Rows(slots, positions, targets if any(span.targets for span in spans) else None)

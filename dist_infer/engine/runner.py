"""What every rank does with a step: compute its spans, and summarize its slice of the wanted logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_infer.config.engine import EngineOptions
from dist_infer.distributed.mesh import Mesh
from dist_infer.engine.step import Kind, SpanOfStep, Step
from dist_infer.model.batch import Batch, TokenSpan
from dist_infer.model.cache import KVCache
from dist_infer.model.decoder import LOGIT_ROWS, Decoder
from dist_infer.model.fallback.decoder import FallbackDecoder
from dist_infer.model.weights import cut
from dist_infer.sampling.slots import Rows, SlotParams, SlotTable
from dist_infer.sampling.summary import HeldRows, SummaryLayout, summarize

# A step that does not fit is sent in two parts; decode steps of a few hundred sequences do.
FIRST_PART = 4096


@dataclass
class Shape:
    """What every rank can tell about the answer to a step: its size is the same on all of them.

    Attributes:
        layout: Which numbers each row's summary holds; None when no logits are wanted.
        rows: Most rows on any fsdp coordinate.
        resolves: Most rows to resolve on any fsdp coordinate.
        vocabulary: Largest vocabulary slice.
    """

    layout: SummaryLayout | None
    rows: int
    resolves: int
    vocabulary: int

    @property
    def summary_size(self) -> int:
        """float32 numbers of all rows' summaries."""
        return self.rows * self.layout.width if self.layout else 0

    @property
    def size(self) -> int:
        """float32 numbers of the whole answer; a resolved row carries processed and raw logits."""
        return self.summary_size + self.resolves * 2 * self.vocabulary


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
        self._held: list[HeldRows] = []

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

    def send(self, step: Step) -> None:
        """Send a step to the workers (on the leader)."""
        if self.mesh.control.size == 1:
            return
        words = torch.from_numpy(step.encode())
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
            if step.kind == Kind.RUN:
                answer, _ = self.execute(step)
                if answer is not None:
                    self.mesh.control.gather(answer)
            elif step.kind == Kind.ERROR:
                raise RuntimeError(f"the leader failed: {step.message}")
            elif step.kind == Kind.SWAP:
                swap(step.message)
            elif step.kind != Kind.HEARTBEAT:
                return step.kind == Kind.RELEASE

    @torch.no_grad()
    def execute(self, step: Step) -> tuple[Tensor | None, Shape]:
        """Compute one step.

        Returns:
            This rank's answer, a flat float32 CPU tensor (None when nothing is wanted of any rank), and its shape:
            the summaries [rows, width], padded to the largest fsdp coordinate's, then the rows to resolve
            [resolves, 2, vocabulary], processed and raw.
        """
        self._apply(step)
        mine = [span for span in step.spans if self.owners[span.slot] == self.coordinate]
        shape = self._shape(step)
        resolved = [row for owner, row in step.resolves if owner == self.coordinate]
        answer = torch.zeros(shape.size) if shape.size else None
        if answer is not None and resolved:
            rows = answer[shape.summary_size :].view(shape.resolves, 2, shape.vocabulary)
            self._fill_resolved(rows, resolved)
        if step.spans:
            self._held = []
            summaries = answer[: shape.summary_size].view(shape.rows, -1) if answer is not None and shape.layout is not None else None
            self._forward(mine, shape.layout, summaries)
        return answer, shape

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
            sources, targets = torch.tensor(copies, device=self.device).T
            self.cache.copy_blocks(sources, targets)

    def _shape(self, step: Step) -> Shape:
        rows, resolves = [0] * self.mesh.shape.fsdp, [0] * self.mesh.shape.fsdp
        params: list[SlotParams] = []
        targets = False
        for span in step.spans:
            if span.rows:
                rows[self.owners[span.slot]] += span.rows
                targets |= bool(span.targets)
                slot_params = self.params[span.slot]
                assert slot_params is not None
                params.append(slot_params)
        for owner, _ in step.resolves:
            resolves[owner] += 1
        layout = SummaryLayout.for_rows(params, targets) if params else None
        return Shape(layout, max(rows), max(resolves), self.largest_slice)

    def _forward(self, spans: list[SpanOfStep], layout: SummaryLayout | None, summaries: Tensor | None) -> None:
        """Run the model on this rank's spans (perhaps none) and write the summaries of their rows."""
        batch = self._batch(spans)
        rows = _rows(spans)

        def reduce(logits: Tensor, first: int) -> None:
            assert layout is not None and summaries is not None
            part = slice(first, first + len(logits))
            targets = None if rows.targets is None else rows.targets[part]
            summary, held = summarize(logits, layout, Rows(rows.slots[part], rows.positions[part], targets), self.table)
            summaries[part] = summary.to("cpu")
            if layout.noised > 1:  # some row filters: the leader may come back for it
                self._held.append(held)

        self.decoder(batch, self.cache, reduce)

    def _batch(self, spans: list[SpanOfStep]) -> Batch:
        produced = [span for span in spans if span.start + len(span.tokens) > self.known[span.slot]]  # decided since admission
        self.table.append([span.slot for span in produced], [span.tokens[-1] for span in produced])
        entering = [
            TokenSpan(span.tokens, span.start, self.blocks[span.slot], span.rows, int(self.rope_anchors[span.slot])) for span in spans
        ]
        return Batch.of(entering, self.cache.block_size, self.decoder.rotary, self.device)

    def _fill_resolved(self, answer: Tensor, rows: list[int]) -> None:
        """Write the held logits of `rows` into `answer` [resolves, 2, vocabulary]."""
        for place, row in enumerate(rows):
            held = self._held[row // LOGIT_ROWS].take([row % LOGIT_ROWS], answer.shape[-1])[0].to("cpu")
            answer[place, : len(held)] = held


def _rows(spans: list[SpanOfStep]) -> Rows:
    """The wanted rows of `spans`, in order."""
    slots, positions, targets = [], [], []
    for span in spans:
        end = span.start + len(span.tokens)
        slots += [span.slot] * span.rows
        positions += range(end + 1 - span.rows, end + 1)
        targets += span.targets or [-1] * span.rows
    return Rows(slots, positions, targets if any(span.targets for span in spans) else None)

"""An engine in one process: the leader's loop and the runners of all ranks around a model that shows what its cache holds.

The stand-in for the decoder keeps token ids where keys would be, and makes logits from the whole context it reads
back through the attention plan. So any token that is missing, stale or another sequence's changes what comes out.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from queue import SimpleQueue
from threading import Barrier, Event, Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_infer.config.engine import EngineOptions
from dist_infer.config.sampling import SamplingParams
from dist_infer.distributed.collectives import SingleRank
from dist_infer.distributed.mesh import MeshShape
from dist_infer.engine.blocks import BlockAllocator
from dist_infer.engine.engine import Delta, Engine
from dist_infer.engine.request import Request, Result
from dist_infer.engine.runner import Runner
from dist_infer.engine.scheduler import RopeRules, Scheduler
from dist_infer.model.attention_plan import AttentionPlan
from dist_infer.model.batch import Batch
from dist_infer.model.cache import KVCache
from dist_infer.model.weights import cut
from dist_infer.sampling.sample import sample

VOCAB = 2000
LONGEST = 40
EOS = 7
POISON = 1999  # a context that ends with it has no finite logits


def logits_of(context: list[int]) -> Tensor:
    """Flat-ish logits [VOCAB] that depend on every token of `context`."""
    if context[-1] == POISON:
        return torch.full((VOCAB,), float("nan"))
    logits = torch.from_numpy(np.random.default_rng(context).standard_normal(VOCAB).astype(np.float32))
    logits[POISON] = -40.0  # not chosen by chance
    return logits


class ContextModel:
    """One rank's decoder: a vocabulary slice of `logits_of` what the cache holds."""

    def __init__(self, tp: int, rank: int) -> None:
        self.config = SimpleNamespace(vocab_size=VOCAB)
        self.vocabulary = cut(VOCAB, tp, rank)
        self.rotary = SimpleNamespace(depends_on_length=False)

    def __call__(self, batch: Batch, cache: KVCache, reduce: Callable[[Tensor, int], None]) -> None:
        if not len(batch.tokens):
            return
        held = batch.tokens.float()[:, None, None]
        cache.write(0, cache.rows(batch.attention.slots), torch.cat((held, held), dim=1))
        contexts: dict[int, list[int]] = {}  # row of a span's last token -> context
        for first, length, blocks, context in _spans(batch.attention):
            tokens = cache.keys[0][blocks, 0, :, 0].reshape(-1)[:context].long().tolist()
            contexts |= {first + i: tokens[: context - length + i + 1] for i in range(length)}
        rows = [logits_of(contexts[row]) for row in batch.logit_rows.tolist()]
        if rows:
            reduce(torch.stack(rows)[:, slice(*self.vocabulary)].contiguous(), 0)


def _spans(plan: AttentionPlan) -> list[tuple[int, int, list[int], int]]:
    """(first row, length, blocks, context) of each span, read as attention would read them."""
    spans = [(span.start, span.length, blocks.tolist(), span.context) for span, blocks in plan.prefills]
    decodes = plan.decodes
    if decodes is not None:
        for row, table, context in zip(decodes.rows.tolist(), decodes.tables.tolist(), decodes.contexts.tolist(), strict=True):
            spans.append((row, 1, table, context))
    return spans


class Wire:
    """The replica's communicator in one process, at the leader."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.workers: list[Runner] = []
        self.received: list[SimpleQueue[Tensor | None]] = [SimpleQueue() for _ in range(size)]
        self.answers: list[SimpleQueue[Tensor | BaseException]] = [SimpleQueue() for _ in range(size)]
        self.spoke = Event()

    def broadcast(self, tensor: Tensor) -> None:
        for inbox in self.received[1:]:
            inbox.put(tensor.clone())
        self.spoke.set()

    def gather(self, answer: Tensor) -> list[Tensor]:
        answers = [answer, *(answers.get(timeout=60) for answers in self.answers[1:])]
        for rank, found in enumerate(answers):
            if isinstance(found, BaseException):
                raise AssertionError(f"rank {rank} failed") from found
        return answers

    def follow(self, rank: int) -> None:
        """What the thread of a worker does."""
        try:
            while self.workers[rank - 1].follow(lambda path: None):
                pass
        except BaseException as error:
            self.answers[rank].put(error)

    def end(self) -> None:
        """Let the workers' threads end."""
        for inbox in self.received:
            inbox.put(None)


class Inbox:
    """A worker's end of the wire."""

    def __init__(self, wire: Wire, rank: int) -> None:
        self.size, self.wire, self.rank = wire.size, wire, rank

    def broadcast(self, tensor: Tensor) -> None:
        received = self.wire.received[self.rank].get()
        if received is None:
            raise SystemExit
        tensor.copy_(received)

    def gather(self, answer: Tensor) -> None:
        self.wire.answers[self.rank].put(answer)


class Group(SingleRank):
    """Ranks of a tp group, each in a thread of its own."""

    def __init__(self, rank: int, parts: list[Tensor | None], barrier: Barrier) -> None:
        self.rank, self.size, self.parts, self.barrier = rank, len(parts), parts, barrier

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self.parts[self.rank] = tensor.clone()
        self.barrier.wait(60)
        tensor.copy_(torch.stack([part for part in self.parts if part is not None]).sum(0))
        self.barrier.wait(60)
        return tensor


def make_engine(
    fsdp: int = 1,
    tp: int = 1,
    blocks: int = 60,
    heartbeat_s: float = 1000.0,
    tokenizer: Any = None,
    follow: bool = True,
    **options: Any,
) -> Engine:
    """An engine, and workers that follow it unless somebody else reads what they are told."""
    limits = EngineOptions(**{"block_size": 4, "max_batch_tokens": 16, "max_sequences": 4, **options})
    wire = Wire(fsdp * tp)
    shape = MeshShape(1, fsdp, tp)
    runners = []
    groups = [([None] * tp, Barrier(tp)) for _ in range(fsdp)]
    for rank in range(fsdp * tp):
        control, coordinates = wire if rank == 0 else Inbox(wire, rank), shape.coordinates(rank)
        mesh = SimpleNamespace(shape=shape, coordinates=coordinates, control=control, tp=Group(coordinates.tp, *groups[coordinates.fsdp]))
        cache = KVCache(1, blocks, 1, limits.block_size, 1, torch.float32, torch.device("cpu"))
        runners.append(Runner(mesh, ContextModel(tp, rank % tp), cache, limits, LONGEST))  # type: ignore[arg-type]
    wire.workers = runners[1:]
    allocators = [BlockAllocator(blocks, limits.block_size, limits.prefix_cache) for _ in range(fsdp)]
    scheduler = Scheduler(limits, allocators, RopeRules(lambda length: 0))
    engine = Engine(runners[0], scheduler, VOCAB, LONGEST, (EOS,), tokenizer, heartbeat_s, bool(limits.overlap))
    if follow:
        for rank in range(1, wire.size):
            Thread(target=wire.follow, args=(rank,), daemon=True).start()
        weakref.finalize(engine, wire.end)
    return engine


def run(engine: Engine, requests: list[Request]) -> dict[str, Result]:
    deltas: list[Delta] = []
    results: list[Result] = []

    def sink(new: list[Delta], done: list[Result]) -> None:
        deltas.extend(new)
        results.extend(done)

    engine.run(iter(requests), sink)
    engine.scheduler.check()
    assert not engine.scheduler.busy and not engine.busy
    assert len({result.id for result in results}) == len(results) == len(requests)
    for result in results:  # what was streamed is what came out
        for index, output in enumerate(result.outputs):
            own = [d for d in deltas if d.request.id == result.id and d.index == index]
            assert [d.token_id for d in own] == output.token_ids
            assert own[-1].finish_reason == output.finish_reason and not any(d.finish_reason for d in own[:-1])
    return {result.id: result for result in results}


def alone(request: Request, index: int) -> list[int]:
    """The tokens of one sequence, by the plain loop."""
    params = request.params.resolved()
    tokens = list(request.token_ids)
    most = min(params.max_tokens or LONGEST, LONGEST - len(tokens))
    produced: list[int] = []
    while len(produced) < most and (not produced or produced[-1] != EOS or params.ignore_eos):
        logits = logits_of(tokens + produced)[None].expand(index + 1, -1)  # the noise of row `index` is that of sequence `index`
        drawn = sample(
            logits,
            request.params,
            [len(tokens) + len(produced)] * (index + 1),
            request.seed,
            prompts=[tokens] * (index + 1),
            outputs=[produced] * (index + 1),
            eos_ids=[EOS],
        )
        produced.append(int(drawn[index]))
    return produced


def traffic(count: int = 24) -> list[Request]:
    """Requests of every kind, many with a common beginning."""
    kinds = [
        SamplingParams(),
        SamplingParams(temperature=1.0, max_tokens=5),
        SamplingParams(temperature=3.0, top_p=0.002, max_tokens=9, logprobs=2, ignore_eos=True),  # mostly resolved a step later
        SamplingParams(temperature=2.0, top_k=5, n=3, max_tokens=6),
        SamplingParams(temperature=1.0, repetition_penalty=1.5, frequency_penalty=1.0, min_tokens=4, logit_bias={EOS: 9.0}),
        SamplingParams(temperature=0.7, min_p=0.2, n=2, max_tokens=12),
    ]
    random = np.random.default_rng(5)
    common = random.integers(10, 200, LONGEST).tolist()
    requests = []
    for i in range(count):
        prompt = common[: random.integers(1, 20)] + random.integers(10, 200, random.integers(1, 10)).tolist()
        requests.append(Request(f"r{i}", prompt, kinds[i % len(kinds)], seed=i, index=i))
        if i % 3 == 0:
            scored = common[: random.integers(4, 30)]
            requests.append(Request(f"s{i}", scored, score_from=int(random.integers(1, len(scored))), index=100 + i))
    return requests

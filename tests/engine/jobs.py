"""What warm ranks do in tests of the whole engine: run requests in a session, or drive its decoder by hand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_infer.config.options import read_options
from dist_infer.config.sampling import SamplingParams
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.memory import GIB
from dist_infer.engine.request import Request, Result
from dist_infer.engine.session import Session
from dist_infer.model.batch import Batch, TokenSpan
from dist_infer.model.weights import HeadCut
from tests.ranks import Ranks

FLOAT32 = ("model.dtype=float32", "device=cpu", "model.tokenizer=none")


@dataclass(frozen=True)
class Mesh:
    """A mesh to test on."""

    tp: int = 1
    fsdp: int = 1
    replicas: int = 1

    @property
    def size(self) -> int:
        """Ranks it takes."""
        return self.tp * self.fsdp * self.replicas

    def __str__(self) -> str:
        return f"tp{self.tp}-fsdp{self.fsdp}-replicas{self.replicas}"


@dataclass
class Run:
    """What a session did.

    Attributes:
        results: Of each batch of requests, in the order of their indices.
        preemptions: Of all replicas.
        prefill_tokens: Tokens the conductor's replica computed in spans longer than one.
        cached_tokens: Tokens it found in the prefix cache.
        resolved: Rows it decided from full logits.
        logits: Of each prompt driven through the decoder by hand, one array for every replica.
    """

    results: list[list[Result]]
    preemptions: int
    prefill_tokens: int
    cached_tokens: int
    resolved: int
    logits: list[list[np.ndarray]]

    def tokens(self, batch: int = 0) -> list[list[int]]:
        """Of each request in a batch, its only output."""
        assert all(result.error is None for result in self.results[batch]), self.results[batch]
        return [result.outputs[0].token_ids for result in self.results[batch]]


def kv_memory(path: str, mesh: Mesh, block_size: int, blocks: int) -> str:
    """The option that gives every rank `blocks` blocks of KV cache, float32."""
    config = Blueprint.of(read_options([f"model.path={path}", *FLOAT32])).config
    heads = max(stop - start for start, stop in (HeadCut.of(config, mesh.tp, rank).kv_heads for rank in range(mesh.tp)))
    block_bytes = 2 * 4 * config.layers * heads * block_size * config.head_dim
    return f"engine.kv_cache_gib={(blocks + 1.5) * block_bytes / GIB:.12f}"  # block 0 is nobody's


def request(tokens: Sequence[int], index: int = 0, score_from: int | None = None, **sampling: Any) -> Request:
    """A request with its own sampling parameters; its seed is its index unless given."""
    params = SamplingParams(**sampling).resolved()
    return Request(str(index), list(tokens), params, index, score_from, index)


def run(
    ranks: Ranks,
    path: str,
    mesh: Mesh,
    batches: Sequence[Sequence[Request]],
    overrides: Sequence[str] = (),
    prompts: Sequence[Sequence[int]] = (),
    slow_rank: int | None = None,
    timeout_s: float = 60.0,
) -> Run:
    """Run batches of requests on a mesh of warm ranks, and `prompts` through the decoder by hand.

    Args:
        ranks: The warm ranks.
        path: Checkpoint.
        mesh: Where it runs.
        batches: Requests; a batch is finished before the next begins.
        overrides: Options over float32 on CPU without a tokenizer.
        prompts: Token ids, whose logits at all positions are wanted.
        slow_rank: A rank that wastes processor time in every step.
        timeout_s: How long it may take.
    """
    answers = ranks(mesh.size).run(_run, path, mesh, batches, [*FLOAT32, *overrides], prompts, slow_rank, timeout_s=timeout_s)
    leaders = [answer["leader"] for answer in answers if answer["leader"] is not None]
    logits = []
    for prompt in range(len(prompts)):
        owner = prompt % mesh.fsdp
        starts = [(replica * mesh.fsdp + owner) * mesh.tp for replica in range(mesh.replicas)]
        logits.append([np.concatenate([answers[start + tp]["logits"][prompt] for tp in range(mesh.tp)], axis=1) for start in starts])
    conductor = leaders[0]
    preemptions = sum(leader["preemptions"] for leader in leaders)
    return Run(answers[0]["results"], preemptions, conductor["prefill"], conductor["cached"], conductor["resolved"], logits)


def _run(
    path: str,
    mesh: Mesh,
    batches: Sequence[Sequence[Request]],
    overrides: Sequence[str],
    prompts: Sequence[Sequence[int]],
    slow_rank: int | None,
) -> dict[str, Any]:
    parallel = [f"parallel.tp={mesh.tp}", f"parallel.fsdp={mesh.fsdp}", f"parallel.replicas={mesh.replicas}"]
    options = read_options([f"model.path={path}", *parallel, *overrides])
    session = Session(options, lambda: Blueprint.of(options), scripted=True)
    try:
        if slow_rank == session.world.rank:
            session.runner.decoder.blocks[0].register_forward_pre_hook(_waste_time)
        results = [_run_batch(session, batch) for batch in batches]
        logits = {index: part.numpy() for index, part in whole_logits(session, prompts).items()} if prompts else {}
        leader = None
        if session.engine is not None:
            session.engine.scheduler.check()
            statistics = session.engine.statistics
            leader = {
                "preemptions": session.engine.scheduler.preemptions,
                "prefill": statistics.prefill_tokens,
                "cached": statistics.cached_tokens,
                "resolved": statistics.resolved,
            }
    except BaseException as error:
        session.close(error)
        raise
    session.close()
    return {"results": results, "logits": logits, "leader": leader}


def _run_batch(session: Session, batch: Sequence[Request]) -> list[Result]:
    if not session.is_conductor:
        session.serve()
        return []
    found: list[Result] = []
    session.run(list(batch), lambda _, results: found.extend(results))
    return sorted(found, key=lambda result: result.index)


def _waste_time(module: torch.nn.Module, inputs: Any) -> None:
    """Keep a processor busy: this rank comes last to every collective."""
    until = os.times().user + 0.1
    while os.times().user < until:
        pass


@torch.no_grad()
def whole_logits(session: Session, prompts: Sequence[Sequence[int]]) -> dict[int, Tensor]:
    """Logits [tokens, vocabulary of this rank] of the prompts of this rank's fsdp coordinate.

    The prompts enter side by side, each in spans of unequal lengths, one-token spans among them, into blocks that lie in disorder.
    Ranks whose prompts have ended keep step with empty batches.
    """
    runner = session.runner
    decoder, size = runner.decoder, runner.cache.block_size
    fsdp, owner = session.mesh.shape.fsdp, session.mesh.coordinates.fsdp
    plans = [_spans(len(prompt), first) for first, prompt in enumerate(prompts)]
    counts = [-(-len(prompt) // size) for prompt in prompts]
    order = np.random.default_rng(0).permutation(sum(counts)).astype(np.int32) + 1
    tables = np.split(order, np.cumsum(counts)[:-1])
    cache = decoder.new_cache(len(order) + 1, size)
    parts: dict[int, list[Tensor]] = {index: [] for index in range(len(prompts)) if index % fsdp == owner}
    for step in range(max(map(len, plans))):
        active = [index for index in parts if step < len(plans[index])]
        spans = []
        for index in active:
            start, stop = plans[index][step]
            spans.append(TokenSpan(prompts[index][start:stop], start, tables[index], stop - start, len(prompts[index])))
        rows: list[Tensor] = []
        decoder(Batch.of(spans, size, decoder.rotary, runner.device), cache, lambda logits, _, rows=rows: rows.append(logits.clone()))
        if active:
            lengths = [len(span.tokens) for span in spans]
            for index, part in zip(active, torch.cat(rows).split(lengths), strict=True):
                parts[index].append(part)
    return {index: torch.cat(part) for index, part in parts.items()}


def _spans(length: int, first: int) -> list[tuple[int, int]]:
    """Cuts `length` tokens into spans of 3, 1, 7, 1, 20... tokens, beginning anywhere in that list."""
    spans: list[tuple[int, int]] = []
    start = 0
    for size in chain(islice(cycle((3, 1, 7, 1, 20)), first, first + length)):
        if start < length:
            spans.append((start, min(start + size, length)))
            start += size
    return spans

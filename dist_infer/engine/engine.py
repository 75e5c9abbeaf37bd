"""The leader's loop: requests in, steps out, tokens decided, results back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dist_infer.engine.request import Output, Request, Result, Score, TokenLogprob, Usage
from dist_infer.engine.runner import Runner, Shape
from dist_infer.engine.scheduler import Entry, Scheduler
from dist_infer.engine.sequence import Sequence
from dist_infer.engine.step import Kind, Step
from dist_infer.model.weights import cut
from dist_infer.sampling.sampler import decide, resolve
from dist_infer.sampling.slots import SlotParams
from dist_infer.sampling.stop import Detokenizer, StopRule, Tokenizer


@dataclass(frozen=True)
class Delta:
    """What one step added to an output."""

    request: Request = field(repr=False)
    index: int
    text: str
    token_id: int
    finish_reason: str | None


@dataclass
class Statistics:
    """What the engine has done: tokens and seconds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    steps: int = 0
    resolved: int = 0


@dataclass
class _Group:
    """The sequences of a request."""

    request: Request
    sequences: list[Sequence]
    pending: int = field(init=False)

    def __post_init__(self) -> None:
        self.pending = len(self.sequences)


class Engine:
    """Runs requests on the ranks of one replica; lives on its leader.

    Args:
        runner: The leader's own rank.
        scheduler: Decides the steps.
        vocab_size: Token ids must be below it.
        max_model_len: Longest sequence.
        eos_ids: The model's end tokens.
        tokenizer: Turns tokens into text; None for token ids only.
        heartbeat_s: An idle engine says so this often, so that no collective runs into its time-out.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        vocab_size: int,
        max_model_len: int,
        eos_ids: tuple[int, ...],
        tokenizer: Tokenizer | None,
        heartbeat_s: float,
    ) -> None:
        self.runner, self.scheduler = runner, scheduler
        self.vocab_size, self.max_model_len = vocab_size, max_model_len
        self.eos_ids, self.tokenizer = eos_ids, tokenizer
        self.statistics = Statistics()
        self._groups: dict[int, _Group] = {}
        self._unresolved: list[tuple[Sequence, int, int]] = []  # sequence, owner, row of the step before
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._stepped = time.monotonic()
        self._following = False  # whether the workers are waiting for steps
        self._heart: threading.Thread | None = None
        if runner.mesh.control.size > 1:
            self._heart = threading.Thread(target=self._beat, args=(heartbeat_s,), daemon=True, name="heartbeat")
            self._heart.start()

    def problem(self, request: Request) -> str | None:
        """Why `request` cannot be run, or None; it concerns that request alone."""
        tokens, limit = len(request.token_ids), self.max_model_len
        if not tokens:
            return "the prompt is empty: give at least one token"
        if min(request.token_ids) < 0 or max(request.token_ids) >= self.vocab_size:
            wrong = next(token for token in request.token_ids if not 0 <= token < self.vocab_size)
            return f"token id {wrong} is outside the vocabulary of {self.vocab_size}"
        if request.score_from is not None:
            if tokens - 1 > limit:
                return f"{tokens} tokens to score; at most {limit + 1} fit (engine.max_model_len={limit})"
            if not 0 < request.score_from < tokens:
                return "nothing to score: the continuation is empty"
        elif tokens >= limit:
            return f"the prompt has {tokens} tokens; at most {limit - 1} fit, and one to produce (engine.max_model_len={limit})"
        return None

    def submit(self, request: Request) -> Result | None:
        """Queue a request; returns its result at once when it cannot be run."""
        problem = self.problem(request)
        if problem is not None:
            return Result(request.id, request.index, error=problem, seed=request.seed, key=request.key)
        sequences: list[Sequence] = []
        for index in range(1 if request.score_from is not None else request.params.n or 1):
            sequences.append(self._sequence(request, index, sequences[0] if sequences else None))
        self._groups[id(request)] = _Group(request, sequences)
        self.statistics.prompt_tokens += len(request.token_ids)
        for sequence in sequences:
            self.scheduler.add(sequence)
        return None

    def cancel(self, request: Request) -> None:
        """Forget a request that is no longer wanted."""
        group = self._groups.pop(id(request), None)
        for sequence in group.sequences if group else []:
            if not sequence.finished:
                self.scheduler.remove(sequence)
                sequence.finish_reason = "cancelled"
        self._unresolved = [entry for entry in self._unresolved if not entry[0].finished]

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._groups)

    def step(self) -> tuple[list[Delta], list[Result]]:
        """One step of all ranks: what it added to outputs, and the requests it finished."""
        began = time.perf_counter()
        with self._lock:
            step, entries = self.scheduler.schedule()
            pending, self._unresolved = self._unresolved, []
            step.resolves = [(owner, row) for _, owner, row in pending]
            assert step.spans or step.resolves, "a step without work: a sequence is stuck"
            self._send(step)
            answer, shape = self.runner.execute(step)
            answers = self.runner.mesh.control.gather(answer) if answer is not None else None
            self._stepped = time.monotonic()
        self._count(entries, began)
        self.scheduler.commit(entries)
        deltas: list[Delta] = []
        results: list[Result] = []
        if answers is not None:
            by_owner = self._rows_by_owner(entries)  # before a sequence ends and leaves its coordinate
            for sequence, token, logprob in self._resolve(pending, answers, shape):
                self._append(sequence, token, logprob, deltas, results)
            for owner, rows in enumerate(by_owner):
                if rows:
                    self._decide(owner, rows, answers, shape, deltas, results)
        return deltas, results

    def run(
        self,
        requests: Iterator[Request],
        sink: Callable[[list[Delta], list[Result]], None],
        stopping: Callable[[], object] = lambda: None,
    ) -> None:
        """Run all of `requests`, taking more from the iterator whenever there is room, and hand on what comes.

        `stopping` is asked between steps; when it says anything but None, what is unfinished is forgotten.
        """
        room = 2 * self.scheduler.options.max_sequences * self.runner.mesh.shape.fsdp
        more = True
        while more or self.busy:
            if stopping() is not None:
                for group in list(self._groups.values()):
                    self.cancel(group.request)
                return
            refused = []
            while more and self.scheduler.load < room:
                request = next(requests, None)
                more = request is not None
                if request is not None:
                    result = self.submit(request)
                    refused += [result] if result is not None else []
            if refused:
                sink([], refused)
            if self.busy:
                sink(*self.step())

    def release(self) -> None:
        """Let the workers return to their callers."""
        with self._lock:
            if self._following:
                self._following = False
                self.runner.send(Step(Kind.RELEASE))

    def swap(self, path: str) -> None:
        """Tell the workers to load the checkpoint at `path`; they follow again when they have (see `resume`)."""
        with self._lock:
            self._following = False
            self.runner.send(Step(Kind.SWAP, message=path))

    def forget_prefixes(self) -> None:
        """Forget what the KV cache holds of prompts: it was computed with other weights."""
        for allocator in self.scheduler.allocators:
            allocator.flush()

    def resume(self) -> None:
        """The workers are following again."""
        with self._lock:
            self._following, self._stepped = True, time.monotonic()

    def close(self, error: str | None = None) -> None:
        """Send the workers away, for good; with `error` they raise it."""
        self._closing.set()
        with self._lock:
            if self._following:
                self._following = False
                self.runner.send(Step(Kind.STOP) if error is None else Step(Kind.ERROR, message=error))
        if self._heart is not None:
            self._heart.join()

    def _sequence(self, request: Request, index: int, parent: Sequence | None) -> Sequence:
        tokens = list(request.token_ids)
        scored = request.score_from is not None
        prompt_len = len(tokens) - 1 if scored else len(tokens)
        if scored:
            return Sequence(request, index, SlotParams(prompt_len=prompt_len), None, tokens, prompt_len)
        slot_params = SlotParams.of(
            request.params, seed=request.seed, sequence=index, prompt_len=prompt_len, eos_ids=self.eos_ids, vocab_size=self.vocab_size
        )
        detokenizer = None
        if self.tokenizer is not None:
            detokenizer = Detokenizer(self.tokenizer, tokens, bool(request.params.skip_special_tokens))
        stop = StopRule(request.params, prompt_len=prompt_len, model_len=self.max_model_len, eos_ids=self.eos_ids, detokenizer=detokenizer)
        return Sequence(request, index, slot_params, stop, tokens, prompt_len, parent)

    def _send(self, step: Step) -> None:
        self._following = True
        self.runner.send(step)

    def _resolve(
        self, pending: list[tuple[Sequence, int, int]], answers: list[Tensor], shape: Shape
    ) -> Iterator[tuple[Sequence, int, float | None]]:
        """Decide the rows of the step before that their summaries left open."""
        taken = [0] * self.runner.mesh.shape.fsdp
        for sequence, owner, _ in pending:
            parts = [a[shape.summary_size :].view(shape.resolves, 2, -1)[taken[owner]] for a in self._shards(answers, owner)]
            taken[owner] += 1
            rows = [part[:, : stop - first] for part, (first, stop) in zip(parts, self._slices(), strict=True)]
            processed, raw = torch.cat(rows, dim=1)
            wanted = sequence.slot_params.logprobs >= 0
            decided = resolve(processed, raw if wanted else None, sequence.slot_params, len(sequence.tokens))
            self.statistics.resolved += 1
            yield sequence, decided.token, decided.logprob

    def _rows_by_owner(self, entries: list[Entry]) -> list[list[tuple[Sequence, int]]]:
        """Of each fsdp coordinate the rows of logits, in order: sequence and position of the token decided or scored."""
        rows: list[list[tuple[Sequence, int]]] = [[] for _ in range(self.runner.mesh.shape.fsdp)]
        for entry in entries:
            owner, end = entry.sequence.owner, entry.sequence.computed + 1
            assert owner is not None
            rows[owner] += [(entry.sequence, position) for position in range(end - entry.rows, end)]
        return rows

    def _decide(
        self, owner: int, rows: list[tuple[Sequence, int]], answers: list[Tensor], shape: Shape, deltas: list[Delta], results: list[Result]
    ) -> None:
        """Decide the rows of one fsdp coordinate."""
        assert shape.layout is not None
        summaries = [a[: shape.summary_size].view(shape.rows, -1)[: len(rows)] for a in self._shards(answers, owner)]
        params = [sequence.slot_params for sequence, _ in rows]
        positions = [position for _, position in rows]
        targets = [sequence.tokens[position] if sequence.scored else -1 for sequence, position in rows]
        made = decide(shape.layout, summaries, params, positions, targets if shape.layout.targets else None)
        unresolved, invalid = set(made.unresolved), set(made.invalid)
        for row, (sequence, position) in enumerate(rows):
            if sequence.finished:
                continue
            if row in invalid:
                self._fail(sequence, f"the model gave no finite logits at position {position}", results)
            elif sequence.scored:
                self._append_score(sequence, position, made.logprobs[row], made.is_greedy[row], results)
            elif row in unresolved:
                self._unresolved.append((sequence, owner, row))
                sequence.logprobs += self._logprob(sequence, -1, made.logprobs[row], made.top_logprobs[row])
            else:
                sequence.logprobs += self._logprob(sequence, made.tokens[row], made.logprobs[row], made.top_logprobs[row])
                self._append(sequence, made.tokens[row], None, deltas, results)

    def _logprob(self, sequence: Sequence, token: int, logprob: float | None, top: list[tuple[int, float]]) -> list[TokenLogprob]:
        wanted = sequence.slot_params.logprobs
        if wanted < 0:
            return []
        return [TokenLogprob(token, logprob if logprob is not None else 0.0, dict(top[:wanted]))]

    def _append(self, sequence: Sequence, token: int, resolved_logprob: float | None, deltas: list[Delta], results: list[Result]) -> None:
        """Add a decided token to its sequence."""
        if sequence.finished:
            return
        if resolved_logprob is not None:
            sequence.logprobs[-1].token_id, sequence.logprobs[-1].logprob = token, resolved_logprob
        assert sequence.stop is not None
        sequence.tokens.append(token)
        self.statistics.output_tokens += 1
        verdict = sequence.stop.push(token)
        deltas.append(Delta(sequence.request, sequence.index, verdict.text, token, verdict.finish_reason))
        if verdict.finish_reason is not None:
            sequence.text = sequence.stop.text
            self._finish(sequence, verdict.finish_reason, results)

    def _append_score(self, sequence: Sequence, position: int, logprob: float | None, greedy: bool, results: list[Result]) -> None:
        assert logprob is not None
        sequence.logprobs.append(TokenLogprob(sequence.tokens[position], logprob))
        sequence.greedy &= greedy
        if position == len(sequence.tokens) - 1:
            self._finish(sequence, "scored", results)

    def _finish(self, sequence: Sequence, reason: str, results: list[Result]) -> None:
        sequence.finish_reason = reason
        self.scheduler.remove(sequence)
        group = self._groups[id(sequence.request)]
        group.pending -= 1
        if not group.pending:
            del self._groups[id(sequence.request)]
            results.append(self._result(group))

    def _fail(self, sequence: Sequence, error: str, results: list[Result]) -> None:
        """End the whole request of `sequence` with an error of its own."""
        request = sequence.request
        self.cancel(request)
        results.append(Result(request.id, request.index, error=error, seed=request.seed, key=request.key))

    def _result(self, group: _Group) -> Result:
        request, first = group.request, group.sequences[0]
        self.statistics.cached_tokens += first.cached
        usage = Usage(first.prompt_len, sum(len(s.output) for s in group.sequences), first.cached)
        if first.scored:
            values = [entry.logprob for entry in first.logprobs]
            usage = Usage(len(request.token_ids), 0, first.cached)
            return Result(request.id, request.index, score=Score(sum(values), first.greedy, values), usage=usage, key=request.key)
        outputs = [
            Output(
                s.text if self.tokenizer is not None else None,
                s.output,
                s.finish_reason,
                s.logprobs if s.slot_params.logprobs >= 0 else None,
            )
            for s in group.sequences
        ]
        seed = request.seed if request.params.seed is None else request.params.seed
        return Result(request.id, request.index, outputs, usage=usage, seed=seed, key=request.key)

    def _shards(self, answers: list[Tensor], owner: int) -> list[Tensor]:
        """The answers of one fsdp coordinate's tp ranks."""
        tp = self.runner.mesh.shape.tp
        return answers[owner * tp : (owner + 1) * tp]

    def _slices(self) -> list[tuple[int, int]]:
        """Vocabulary slice of each tp rank."""
        tp = self.runner.mesh.shape.tp
        return [cut(self.vocab_size, tp, rank) for rank in range(tp)]

    def _count(self, entries: list[Entry], began: float) -> None:
        statistics, seconds = self.statistics, time.perf_counter() - began
        statistics.steps += 1
        prompts = sum(entry.length for entry in entries if entry.length > 1)
        if prompts:
            statistics.prefill_tokens += prompts
            statistics.prefill_seconds += seconds
        else:
            statistics.decode_tokens += len(entries)
            statistics.decode_seconds += seconds

    def _beat(self, interval: float) -> None:
        """Tell waiting workers now and then that the leader is alive."""
        while not self._closing.wait(interval):
            with self._lock:
                if self._following and time.monotonic() - self._stepped >= interval:
                    self.runner.send(Step(Kind.HEARTBEAT))
                    self._stepped = time.monotonic()

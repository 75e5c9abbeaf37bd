"""The leader's loop: requests in, steps out, tokens decided, results back."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from dist_infer.engine.decider import Decided, Decider
from dist_infer.engine.request import Output, Request, Result, Score, TokenLogprob, Usage
from dist_infer.engine.runner import Answer, Runner
from dist_infer.engine.scheduler import Entry, Scheduler
from dist_infer.engine.sequence import Sequence
from dist_infer.engine.statistics import Statistics
from dist_infer.engine.step import Kind, Step
from dist_infer.sampling.slots import SlotParams
from dist_infer.sampling.stop import Detokenizer, StopRule, Tokenizer


@dataclass(slots=True)
class Delta:
    """What one step added to an output."""

    request: Request = field(repr=False)
    index: int
    text: str
    token_id: int
    finish_reason: str | None


Sink = Callable[[list[Delta], list[Result]], None]  # what is given to whoever waits for it


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

    With `overlap` a step's plan is made and sent while the step before is computed. Where the ranks find its missing tokens out by
    themselves they go on with it at once, else the tokens follow as soon as they are decided; what else is to be done with them (text,
    stop rules, results) is done while it is computed. A stop found so late costs one row, which is dropped.

    Args:
        runner: The leader's own rank.
        scheduler: Decides the steps.
        vocab_size: Token ids must be below it.
        max_model_len: Longest sequence.
        eos_ids: The model's end tokens.
        tokenizer: Turns tokens into text; None for token ids only.
        heartbeat_s: An idle engine says so this often, so that no collective runs into its time-out.
        overlap: Whether steps overlap; worth it where a device computes by itself.
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
        overlap: bool = False,
    ) -> None:
        self.runner, self.scheduler, self.overlap = runner, scheduler, overlap
        self.vocab_size, self.max_model_len = vocab_size, max_model_len
        self.eos_ids, self.tokenizer = eos_ids, tokenizer
        self.statistics = Statistics()
        self._decider = Decider(runner.mesh.shape, vocab_size, self._full_rows)
        self._groups: dict[int, _Group] = {}
        self._launched: list[Entry] = []  # of the step that is being computed between two calls of `step`
        self._waited = 0.0  # seconds of the present step that were not the leader's own
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._stepped = time.monotonic()
        self._following = False  # whether the workers are waiting for steps
        self._heart: threading.Thread | None = None
        if runner.mesh.control.size > 1:
            beat = (weakref.ref(self), self._closing, heartbeat_s)
            self._heart = threading.Thread(target=_beat, args=beat, daemon=True, name="heartbeat")
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
        self._forget(request)
        with self._lock:
            self._drain()

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._groups)

    def step(self) -> tuple[list[Delta], list[Result]]:
        """One step of all ranks: what it added to outputs, and the requests it finished."""
        began, self._waited = time.perf_counter(), 0.0
        deltas: list[Delta] = []
        results: list[Result] = []
        with self._lock:
            entries, decided = self._overlapped() if self.overlap else self._alone()
            self._stepped = time.monotonic()
            self.statistics.count(entries, time.perf_counter() - began)
            for entry in entries:
                entry.sequence.awaited = False
            for part in decided:
                self._take_in(part, deltas, results)
            self._drain()
        self.statistics.leader_seconds += time.perf_counter() - began - self._waited
        return deltas, results

    def run(self, requests: Iterator[Request], sink: Sink, stopping: Callable[[], object] = lambda: None) -> None:
        """Run all of `requests`, taking more from the iterator whenever there is room, and hand on what comes.

        `stopping` is asked between steps; when it says anything but None, what is unfinished is forgotten.
        """
        try:
            self._run(requests, sink, stopping)
        except KeyboardInterrupt:
            if self.runner.mesh.control.size == 1:  # with other ranks there is no way back into step
                self._cancel_all()
            raise

    def _run(self, requests: Iterator[Request], sink: Sink, stopping: Callable[[], object]) -> None:
        room = 2 * self.scheduler.options.max_sequences * self.runner.mesh.shape.fsdp
        more = True
        while more or self.busy:
            if stopping() is not None:
                self._cancel_all()
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
                self.runner.send(Step(Kind.RELEASE).encode())

    def swap(self, path: str) -> None:
        """Tell the workers to load the checkpoint at `path`; they follow again when they have (see `resume`)."""
        with self._lock:
            self._following = False
            self.runner.send(Step(Kind.SWAP, message=path).encode())

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
                self.runner.send((Step(Kind.STOP) if error is None else Step(Kind.ERROR, message=error)).encode())
        if self._heart is not None:
            self._heart.join()

    def _sequence(self, request: Request, index: int, parent: Sequence | None) -> Sequence:
        tokens = list(request.token_ids)
        scored = request.score_from is not None
        prompt_len = len(tokens) - 1 if scored else len(tokens)
        if scored:
            return Sequence(request, index, SlotParams(prompt_len=prompt_len), None, tokens, prompt_len, prompt_len)
        slot_params = SlotParams.of(
            request.params, seed=request.seed, sequence=index, prompt_len=prompt_len, eos_ids=self.eos_ids, vocab_size=self.vocab_size
        )
        detokenizer = None
        if self.tokenizer is not None:
            detokenizer = Detokenizer(self.tokenizer, tokens, bool(request.params.skip_special_tokens))
        stop = StopRule(request.params, prompt_len=prompt_len, model_len=self.max_model_len, eos_ids=self.eos_ids, detokenizer=detokenizer)
        return Sequence(request, index, slot_params, stop, tokens, prompt_len, prompt_len + stop.max_tokens, parent)

    def _alone(self) -> tuple[list[Entry], list[Decided]]:
        """A step from its schedule to its tokens."""
        step, entries = self.scheduler.schedule()
        assert step.spans, "a step without work: a sequence is stuck"
        answers = self._tell(step)
        self.scheduler.commit(entries)
        return entries, self._decider.decide(entries, answers)

    def _overlapped(self) -> tuple[list[Entry], list[Decided]]:
        """The tokens of the step that is being computed; leaves the next one being computed."""
        entries = self._launched or self._launch_first()
        self.scheduler.commit(entries)
        plan, planned = self.scheduler.schedule()
        plan.kind = Kind.CONTINUE if planned and self.runner.knows else Kind.PLAN
        decided = self._decider.decide(entries, self._tell(plan))
        self._launched = planned
        if planned and plan.kind == Kind.PLAN:
            self._tell(Step(Kind.LAUNCH, plan.number, decided=self._by_slot(decided)))
        return entries, decided

    def _launch_first(self) -> list[Entry]:
        """Let the ranks begin a step when they have none."""
        plan, entries = self.scheduler.schedule()
        assert plan.spans, "a step without work: a sequence is stuck"
        plan.kind = Kind.CONTINUE
        self._tell(plan)
        return entries

    def _by_slot(self, decided: list[Decided]) -> list[int]:
        """The token decided for each slot; 0 where there is none, and where a sequence fails."""
        tokens = [0] * len(self.runner.params)
        for part in decided:
            for (sequence, _), token in zip(part.rows, part.made.tokens, strict=True):
                if sequence.slot is not None:
                    tokens[sequence.slot] = max(token, 0)
        return tokens

    def _drain(self) -> None:
        """Let the ranks finish a step whose sequences have all ended."""
        if self._launched and not self._groups:
            self._launched = []
            self._tell(Step(Kind.PLAN))

    def _tell(self, step: Step) -> list[Answer] | None:
        """Send `step`, do this rank's part, and collect what the ranks answer."""
        self._following = True
        control = self.runner.mesh.control
        words = step.encode() if control.size > 1 else None
        began = time.perf_counter()
        if words is not None:
            self.runner.send(words)
        answer = self.runner.execute(step)
        answers = None
        if answer is not None:
            parts = control.gather(answer.values)
            assert parts is not None
            answers = [Answer(part, answer.layout) for part in parts]
        self._waited += time.perf_counter() - began
        return answers

    def _full_rows(self, rows: list[tuple[int, int]]) -> list[Answer]:
        """The full logits of rows (owner, row) of the step answered last."""
        answers = self._tell(Step(Kind.RESOLVE, resolves=rows))
        assert answers is not None
        return answers

    def _take_in(self, part: Decided, deltas: list[Delta], results: list[Result]) -> None:
        """Give sequences what was decided for them."""
        made, invalid = part.made, set(part.made.invalid)
        self.statistics.resolved += len(made.unresolved)
        for row, (sequence, position) in enumerate(part.rows):
            if sequence.finished:
                continue
            if row in invalid:
                self._fail(sequence, f"the model gave no finite logits at position {position}", results)
            elif sequence.scored:
                self._append_score(sequence, position, made.logprobs[row], made.is_greedy[row], results)
            else:
                wanted = sequence.slot_params.logprobs
                if wanted >= 0:
                    logprob = made.logprobs[row]
                    assert logprob is not None
                    sequence.logprobs.append(TokenLogprob(made.tokens[row], logprob, dict(made.top_logprobs[row][:wanted])))
                self._append(sequence, made.tokens[row], deltas, results)

    def _append(self, sequence: Sequence, token: int, deltas: list[Delta], results: list[Result]) -> None:
        """Add a decided token to its sequence."""
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
        self._forget(request)
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

    def _forget(self, request: Request) -> None:
        group = self._groups.pop(id(request), None)
        for sequence in group.sequences if group else []:
            if not sequence.finished:
                self.scheduler.remove(sequence)
                sequence.finish_reason = "cancelled"

    def _cancel_all(self) -> None:
        """Forget all requests."""
        for group in list(self._groups.values()):
            self.cancel(group.request)

    def _say_alive(self, interval: float) -> None:
        """Tell workers that wait for steps, if they have heard nothing for so long."""
        with self._lock:
            if self._following and time.monotonic() - self._stepped >= interval:
                self.runner.send(Step(Kind.HEARTBEAT).encode())
                self._stepped = time.monotonic()


def _beat(of: weakref.ref[Engine], closing: threading.Event, interval: float) -> None:
    """Let an engine say now and then that it is alive, as long as it is."""
    while not closing.wait(interval):
        engine = of()
        if engine is None:
            return
        engine._say_alive(interval)
        del engine

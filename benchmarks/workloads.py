"""What is measured: the requests of every workload, who runs them, and which numbers come of an answer."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

Values = dict[str, float]  # by label: a side, or one way of using it
FILLING = 512  # tokens of a prompt that fills caches
FIRST_ID = 3  # token ids below it are special


@dataclass(frozen=True)
class Sizes:
    """How large the workloads are, in requests and tokens.

    Attributes:
        batches: Sequences at once, of decoding.
        prompt, new: Tokens of a prompt, and those made of it.
        mix: Requests of the offline mix; `mix_prompts` and `mix_new` are the least and most tokens of each.
        long: Tokens of the long prompt.
        wide: Prompts that are read at once.
        scored: Sequences scored at once, of `prompt` tokens and a quarter of them scored.
        curve_batches: Sequences at once, for the time of a step.
        curve_contexts: Tokens before a step, for its time with `curve_sequences`.
    """

    batches: tuple[int, ...] = (1, 8, 32)
    prompt: int = 128
    new: int = 64
    mix: int = 64
    mix_prompts: tuple[int, int] = (16, 256)
    mix_new: tuple[int, int] = (16, 128)
    long: int = 2048
    wide: int = 32
    scored: int = 32
    curve_batches: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 17, 24, 32, 33, 48, 64)
    curve_contexts: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    curve_sequences: int = 4
    curve_new: int = 24


QUICK = Sizes((1, 8, 32), 16, 8, 8, (8, 32), (4, 16), 128, 4, 4, (1, 8, 9), (32, 64, 128), 2, 6)


@dataclass
class Turn:
    """One command to one side.

    Attributes:
        label: What the values are known by.
        side: Who is asked.
        command: What.
        values: The numbers of an answer.
    """

    label: str
    side: str
    command: dict[str, Any]
    values: Callable[[dict[str, Any]], Values]


@dataclass
class Workload:
    """Turns that alternate.

    Attributes:
        name: As `--only` takes it, with a size behind it where there are several.
        unit: Of the values.
        turns: Makes the turns of a round.
        repeats: Rounds for each that is asked for: short turns need more.
        once: One round is enough, however many are asked for.
        checked: Whether tokens are greedy, and compared with float32's.
        more_is_better: Of its values; None where those of different labels are not compared.
    """

    name: str
    unit: str
    turns: Callable[[random.Random], list[Turn]]
    repeats: int = 1
    once: bool = False
    checked: bool = False
    more_is_better: bool | None = True


@dataclass
class Maker:
    """Makes the workloads of a model.

    Attributes:
        sizes: How large they are.
        vocabulary: Token ids are below it.
        ours: Our sides with tp=1 and tp=2, as far as they can be run.
        peers: The others that can be run, among them transformers, which runs static batches only.
    """

    sizes: Sizes
    vocabulary: int
    ours: list[str]
    peers: list[str] = field(default_factory=list)

    def all(self) -> list[Workload]:
        """Every workload that runs on a side of this run's."""
        sizes, everyone = self.sizes, [*self.ours, *self.peers]
        first = self.ours[0]
        made = [
            Workload(f"decode {batch}", "tokens/s", self._decode(batch, everyone), repeats=2 if batch == 1 else 1, checked=True)
            for batch in sizes.batches
        ]
        return [
            *made,
            Workload("limit", "tokens/s or GB/s", self._limit(first), repeats=2, more_is_better=None),
            Workload("mix", "output tokens/s", self._mix([side for side in (first, "vLLM tp=1") if side in everyone]), checked=True),
            Workload(f"prefill 1x{sizes.long}", "tokens/s", self._prefill(1, sizes.long, everyone), repeats=2, checked=True),
            Workload(f"prefill {sizes.wide}x{sizes.prompt}", "tokens/s", self._prefill(sizes.wide, sizes.prompt, everyone), checked=True),
            Workload("sampled", "ms a step", self._sampled(first), more_is_better=False),
            Workload("idle", "ms a step", self._idle(first), more_is_better=False),
            Workload("scoring", "tokens/s", self._scoring()),
            Workload(f"curve, context {sizes.prompt}, batch", "ms a step", self._curve_of_batches(first), once=True, more_is_better=None),
            Workload(
                f"curve, batch {sizes.curve_sequences}, context",
                "ms a step",
                self._curve_of_contexts(first),
                once=True,
                more_is_better=None,
            ),
        ]

    def first(self) -> dict[str, Any]:
        """What a side is asked as soon as it has started: one token."""
        return _generate(self._prompts(random.Random(0), 1, 16), [1])

    def warm(self) -> dict[str, Any]:
        """What a side is asked before anything is measured."""
        return _generate(self._prompts(random.Random(1), self.sizes.wide, self.sizes.prompt), [4] * self.sizes.wide)

    def fill(self, tokens: int) -> dict[str, Any]:
        """What a side is asked to write so many tokens to its KV cache."""
        count = tokens // FILLING
        return _generate(self._prompts(random.Random(2), count, FILLING), [1] * count)

    def _prompts(self, rng: random.Random, count: int, tokens: int) -> list[list[int]]:
        return [[rng.randrange(FIRST_ID, self.vocabulary) for _ in range(tokens)] for _ in range(count)]

    def _decode(self, batch: int, sides: list[str]) -> Callable[[random.Random], list[Turn]]:
        def turns(rng: random.Random) -> list[Turn]:
            command = _generate(self._prompts(rng, batch, self.sizes.prompt), [self.sizes.new] * batch)
            return [Turn(side, side, command, lambda answer, side=side: {side: decode_rate(answer, batch)}) for side in sides]

        return turns

    def _limit(self, side: str) -> Callable[[random.Random], list[Turn]]:
        def turns(rng: random.Random) -> list[Turn]:
            command = _generate(self._prompts(rng, 1, self.sizes.prompt), [self.sizes.new])
            return [
                Turn("GEMV", "bandwidth", {"do": "measure"}, lambda answer: {f"GEMV, {how}": value for how, value in answer.items()}),
                Turn(side, side, command, lambda answer: {side: decode_rate(answer, 1)}),
            ]

        return turns

    def _mix(self, sides: list[str]) -> Callable[[random.Random], list[Turn]]:
        def turns(rng: random.Random) -> list[Turn]:
            prompts = [self._prompts(rng, 1, rng.randint(*self.sizes.mix_prompts))[0] for _ in range(self.sizes.mix)]
            command = _generate(prompts, [rng.randint(*self.sizes.mix_new) for _ in prompts])
            return [
                Turn(side, side, command, lambda answer, side=side: {side: answer["counts"][-1] / answer["times"][-1]}) for side in sides
            ]

        return turns

    def _prefill(self, count: int, tokens: int, sides: list[str]) -> Callable[[random.Random], list[Turn]]:
        def turns(rng: random.Random) -> list[Turn]:
            command = _generate(self._prompts(rng, count, tokens), [1] * count)
            return [Turn(side, side, command, lambda answer, side=side: {side: count * tokens / answer["first"]}) for side in sides]

        return turns

    def _sampled(self, side: str) -> Callable[[random.Random], list[Turn]]:
        batch = max(self.sizes.batches)

        def turns(rng: random.Random) -> list[Turn]:
            greedy = _generate(self._prompts(rng, batch, self.sizes.prompt), [self.sizes.new] * batch)
            sampled = {**greedy, "prompts": self._prompts(rng, batch, self.sizes.prompt)}
            sampled |= {"temperature": 1.0, "top_p": 0.95, "seed": rng.randrange(2**31)}
            ways = {"greedy": greedy, "top-p 0.95": sampled}
            return [
                Turn(label, side, command, lambda answer, label=label: {label: step_ms(answer, batch)}) for label, command in ways.items()
            ]

        return turns

    def _idle(self, side: str) -> Callable[[random.Random], list[Turn]]:
        batch = max(self.sizes.batches)

        def turns(rng: random.Random) -> list[Turn]:
            command = _generate(self._prompts(rng, batch, self.sizes.prompt), [self.sizes.new] * batch)
            return [
                Turn(name, name, command, lambda answer, name=name: {name: step_ms(answer, batch)})
                for name in (side, "ours, features off", "ours, features off again")
            ]

        return turns

    def _scoring(self) -> Callable[[random.Random], list[Turn]]:
        count, scored = self.sizes.scored, self.sizes.prompt // 4

        def turns(rng: random.Random) -> list[Turn]:
            texts = self._prompts(rng, count, self.sizes.prompt + scored)
            command = {"do": "score", "contexts": [text[:-scored] for text in texts], "continuations": [text[-scored:] for text in texts]}
            total = sum(map(len, texts))
            sides = ("ours fsdp=2", "ours replicas=2")
            return [Turn(side, side, command, lambda answer, side=side: {side: total / answer["seconds"]}) for side in sides]

        return turns

    def _curve_of_batches(self, side: str) -> Callable[[random.Random], list[Turn]]:
        def turns(rng: random.Random) -> list[Turn]:
            sizes = self.sizes
            commands = {batch: self._prompts(rng, batch, sizes.prompt) for batch in sizes.curve_batches}
            return [_point(batch, side, _generate(prompts, [sizes.curve_new] * batch), batch) for batch, prompts in commands.items()]

        return turns

    def _curve_of_contexts(self, side: str) -> Callable[[random.Random], list[Turn]]:
        def turns(rng: random.Random) -> list[Turn]:
            # Each context continues the one before, so that only what is new of it is read.
            count, contexts = self.sizes.curve_sequences, self.sizes.curve_contexts
            texts = self._prompts(rng, count, max(contexts))
            commands = {context: _generate([text[:context] for text in texts], [self.sizes.curve_new] * count) for context in contexts}
            return [_point(context, side, command, count) for context, command in commands.items()]

        return turns


def step_ms(answer: dict[str, Any], batch: int) -> float:
    """The median of the steps that made a token of every sequence."""
    return median(1e3 * seconds for seconds in _full_steps(answer, batch))


def decode_rate(answer: dict[str, Any], batch: int) -> float:
    """Tokens/s of those steps, over all the time they took."""
    steps = _full_steps(answer, batch)
    return batch * len(steps) / sum(steps)


def _full_steps(answer: dict[str, Any], batch: int) -> list[float]:
    """Seconds of every step that made a token of every sequence, once all had their first."""
    times, counts = answer["times"], answer["counts"]
    return [
        after - before
        for (before, after), (less, more) in zip(pairwise(times), pairwise(counts), strict=True)
        if before >= answer["first"] and more - less == batch
    ]


def _generate(prompts: list[list[int]], new_tokens: list[int]) -> dict[str, Any]:
    return {"do": "generate", "prompts": prompts, "new_tokens": new_tokens}


def _point(place: int, side: str, command: dict[str, Any], batch: int) -> Turn:
    """A turn that measures one place of a curve."""
    return Turn(str(place), side, command, lambda answer: {str(place): step_ms(answer, batch)})

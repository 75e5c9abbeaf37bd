"""One stream of tokens being produced (or scored) for a request."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from dist_infer.engine.request import Request, TokenLogprob
from dist_infer.sampling.slots import SlotParams
from dist_infer.sampling.stop import StopRule

_arrivals = itertools.count()


@dataclass(eq=False, slots=True)
class Sequence:
    """The leader's view of a sequence.

    Attributes:
        request: What it belongs to.
        index: Its place among the request's `n`.
        slot_params: The numbers it is sampled with.
        stop: Decides when it ends; None when it is scored.
        tokens: Prompt and output.
        prompt_len: How many of them are the prompt; of a scored sequence, all that must be computed.
        longest: Tokens it has at most; when it will have as many, it is known to end.
        parent: The first sequence of the request, whose prompt blocks this one may share.
        computed: Tokens whose keys and values are in the cache, or enter it in the step that is being computed.
        awaited: Whether rows of it are being computed: its next token, or scores.
        cached: Tokens of the prompt that were found in the prefix cache.
        blocks: Block table.
        hashes: Prefix hash of each full block of tokens, as far as known.
        slot, owner: Where it runs: slot of the workers' tables, fsdp coordinate; None while it waits.
        rope_anchor: Length it had when admitted; decides its rotary regime.
        logprobs: Raw logprobs of the output (generation) or of the scored tokens.
        greedy: Scoring: whether every scored token was the best one.
    """

    request: Request
    index: int
    slot_params: SlotParams
    stop: StopRule | None
    tokens: list[int]
    prompt_len: int
    longest: int
    parent: Sequence | None = None
    computed: int = 0
    awaited: bool = False
    cached: int = 0
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    slot: int | None = None
    owner: int | None = None
    rope_anchor: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    greedy: bool = True
    text: str = ""
    finish_reason: str | None = None
    arrival: int = field(default_factory=_arrivals.__next__)

    @property
    def scored(self) -> bool:
        """Whether it is scored rather than continued."""
        return self.request.score_from is not None

    @property
    def first_row(self) -> int:
        """First position whose logits are wanted; tokens scored before a sequence was sent back are not scored again."""
        score_from = self.request.score_from
        return self.length - 1 if score_from is None else score_from - 1 + len(self.logprobs)

    @property
    def length(self) -> int:
        """Tokens there are to compute, the one that is being decided included unless it is known to be the last."""
        if self.request.score_from is not None:
            return self.prompt_len
        known = len(self.tokens)
        return known + 1 if self.awaited and known + 1 < self.longest else known

    @property
    def missing(self) -> int:
        """Tokens still to be computed."""
        return self.length - self.computed

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.finish_reason is not None

    @property
    def output(self) -> list[int]:
        """Tokens produced so far."""
        return self.tokens[self.prompt_len :]

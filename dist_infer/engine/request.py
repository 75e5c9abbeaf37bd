"""What a user asks for, and what comes back."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from dist_infer.config.sampling import SamplingParams

SCHEMA = 1


@dataclass
class Request:
    """One prompt to continue, or one continuation to score.

    Attributes:
        id: The user's name for it.
        token_ids: The prompt; for scoring, context and continuation together.
        params: Sampling parameters, defaults filled in.
        seed: Seed of its noise.
        score_from: First token to score; None to generate.
        index: Its place in the user's list.
        key: What it is known by in a journal; see `key_for`.
    """

    id: str
    token_ids: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    score_from: int | None = None
    index: int = 0
    key: str = ""

    def key_for(self, identity: str, version: str = "") -> str:
        """Hash of what determines the result.

        Args:
            identity: The checkpoint's.
            version: Of the task that asks, when there is one.

        A seed counts if it was given; one that was drawn does not, for its result is as good as any.
        """
        what = [identity, version, self.token_ids, vars(self.params), self.score_from]
        return hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """A dictionary `from_json` understands."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Request:
        """The request that `to_json` wrote."""
        params = dict(data["params"])
        if params["logit_bias"]:  # JSON keys are strings
            params["logit_bias"] = {int(token): bias for token, bias in params["logit_bias"].items()}
        return cls(**{**data, "params": SamplingParams(**params)})


@dataclass
class TokenLogprob:
    """Raw log-probability of a token: of the logits as the model gave them, before penalties, temperature and filters."""

    token_id: int
    logprob: float
    top: dict[int, float] = field(default_factory=dict)


@dataclass
class Output:
    """One produced sequence."""

    text: str | None
    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[TokenLogprob] | None = None


@dataclass
class Score:
    """How likely a continuation is."""

    logprob: float
    is_greedy: bool
    token_logprobs: list[float]


@dataclass
class Usage:
    """Tokens that a request took."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass
class Result:
    """What became of a request: outputs, a score, or an error that concerns it alone."""

    id: str
    index: int
    outputs: list[Output] = field(default_factory=list)
    score: Score | None = None
    usage: Usage | None = None
    error: str | None = None
    seed: int | None = None
    key: str = ""

    def to_json(self) -> dict[str, Any]:
        """A dictionary `from_json` understands."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        """The result that `to_json` wrote."""
        outputs = []
        for output in data["outputs"]:
            entries = output["logprobs"]
            if entries is not None:
                entries = [TokenLogprob(e["token_id"], e["logprob"], {int(t): p for t, p in e["top"].items()}) for e in entries]
            outputs.append(Output(output["text"], output["token_ids"], output["finish_reason"], entries))
        score = Score(**data["score"]) if data["score"] else None
        usage = Usage(**data["usage"]) if data["usage"] else None
        return cls(data["id"], data["index"], outputs, score, usage, data["error"], data["seed"], data.get("key", ""))

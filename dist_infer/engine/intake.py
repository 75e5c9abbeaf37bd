"""From what users write (text, messages, token ids, lines of a file) to requests."""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from dist_infer.config.sampling import SamplingParams
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.request import Request

PROMPT_KEYS = ("prompt", "messages", "prompt_token_ids")
Prompt = str | Sequence[int] | Sequence[dict[str, Any]]


class Intake:
    """Makes requests for one model. Everything it refuses, it refuses with ValueError and one line."""

    def __init__(self, blueprint: Blueprint) -> None:
        self.blueprint = blueprint
        self.tokenizer = blueprint.tokenizer

    def request(self, prompt: Prompt, params: SamplingParams | None = None, identifier: str | None = None, index: int = 0) -> Request:
        """A request to continue a text, a list of token ids, or a chat (a list of messages with role and content)."""
        if isinstance(prompt, str):
            kind = "prompt"
        else:
            kind = "messages" if len(prompt) > 0 and isinstance(prompt[0], dict) else "prompt_token_ids"
        return self._make(self._tokens(kind, prompt), params or SamplingParams(), identifier, index)

    def score(
        self, context: str | Sequence[int], continuation: str | Sequence[int], identifier: str | None = None, index: int = 0
    ) -> Request:
        """A request to score `continuation` after `context`, both text or both token ids; the context may be empty."""
        if isinstance(context, str) and isinstance(continuation, str):
            before, after = self._pair(context, continuation)
        elif not isinstance(context, str) and not isinstance(continuation, str):
            before, after = self.token_ids(context, "context_token_ids"), self.token_ids(continuation, "continuation_token_ids")
        else:
            raise ValueError("context and continuation must both be text or both be token ids")
        if not after:
            raise ValueError("the continuation is empty: give at least one token to score")
        before = before or [self._first_token()]
        request = self._make([*before, *after], SamplingParams(), identifier, index)
        request.score_from = len(before)
        return request

    def line(self, data: Any, index: int) -> Request:
        """A request from one line of an input file."""
        self._check_keys(data, ("id", "sampling", *PROMPT_KEYS))
        given = [key for key in PROMPT_KEYS if key in data]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(PROMPT_KEYS)}; this line has {' and '.join(given) or 'none'}")
        kind, prompt = given[0], data[given[0]]
        wanted = str if kind == "prompt" else list
        if not isinstance(prompt, wanted):
            raise ValueError(f"{kind} must be a {'string' if wanted is str else 'list'}, not {type(prompt).__name__}")
        tokens = self._tokens(kind, prompt)
        return self._make(tokens, self._params(data.get("sampling", {})), _identifier(data, index), index)

    def score_line(self, data: Any, index: int) -> Request:
        """A request to score from one line of an input file."""
        self._check_keys(data, ("id", "context", "continuation", "context_token_ids", "continuation_token_ids"))
        for names in (("context", "continuation"), ("context_token_ids", "continuation_token_ids")):
            if set(data) - {"id"} == set(names):
                context, continuation = (data[name] for name in names)
                wanted = str if names[0] == "context" else list
                if not isinstance(context, wanted) or not isinstance(continuation, wanted):
                    raise ValueError(f"{names[0]} and {names[1]} must be {'strings' if wanted is str else 'lists of token ids'}")
                return self.score(context, continuation, _identifier(data, index), index)
        raise ValueError("give context and continuation, or context_token_ids and continuation_token_ids")

    def text(self, prompt: str) -> list[int]:
        """Token ids of a prompt, with whatever special tokens the tokenizer adds."""
        if not prompt:
            raise ValueError("the prompt is empty: give some text")
        _check_text(prompt)
        return list(self.blueprint.need_tokenizer("a text prompt")(prompt)["input_ids"])

    def messages(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a chat, by the model's template, up to where the answer begins."""
        tokenizer = self.blueprint.need_tokenizer("a chat")
        if not messages:
            raise ValueError("messages is empty: give at least one message")
        if not all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages):
            raise ValueError("each message must have a role and a content, both strings")
        _check_text("".join(message["content"] for message in messages))
        if tokenizer.chat_template is None:
            raise ValueError("the model's tokenizer has no chat template: give a prompt instead of messages")
        try:
            return list(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=False))
        except Exception as error:  # a template raises what it likes
            raise ValueError(f"the chat template refuses these messages: {' '.join(str(error).split())}") from None

    def token_ids(self, tokens: Sequence[Any], name: str) -> list[int]:
        """Checked token ids."""
        vocab_size = self.blueprint.config.vocab_size
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
                raise ValueError(f"{name}: {token!r} is no token id; the model's are 0 to {vocab_size - 1}")
        return list(tokens)

    def _tokens(self, kind: str, prompt: Any) -> list[int]:
        """Token ids of a prompt of any of `PROMPT_KEYS`."""
        if kind == "prompt":
            return self.text(prompt)
        return self.messages(prompt) if kind == "messages" else self.token_ids(prompt, kind)

    def _make(self, tokens: list[int], given: SamplingParams, identifier: str | None, index: int) -> Request:
        params = self.blueprint.params(given)
        longest = self.blueprint.generation.max_length
        if params.max_tokens is None and longest is not None:
            params = SamplingParams(max_tokens=max(longest - len(tokens), 1)).over(params)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        return Request(str(index) if identifier is None else identifier, tokens, params, seed, index=index)

    def _params(self, data: Any) -> SamplingParams:
        if not isinstance(data, dict):
            raise ValueError(f"sampling must be an object, not {type(data).__name__}")
        known = [item.name for item in fields(SamplingParams)]
        for key in data:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                raise ValueError(f"sampling.{key}: there is no such parameter{f'; did you mean {near[0]}?' if near else ''}")
        bias = data.get("logit_bias")
        if isinstance(bias, dict):  # keys of a JSON object are strings
            data = {**data, "logit_bias": {int(token) if token.isdecimal() else token: value for token, value in bias.items()}}
        return SamplingParams(**data)

    def _check_keys(self, data: Any, known: Sequence[str]) -> None:
        if not isinstance(data, dict):
            raise ValueError(f"a line must be a JSON object, not {type(data).__name__}")
        for key in data:
            if key not in known:
                raise ValueError(f"{key!r}: there is no such field; known are {', '.join(known)}")

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of context and continuation; the continuation is what tokenizing both together adds.

        Spaces at the context's end go to the continuation, as in lm-evaluation-harness.
        """
        tokenizer = self.blueprint.need_tokenizer("a text to score")
        if not continuation:
            raise ValueError("the continuation is empty: give some text to score")
        _check_text(context + continuation)
        if not context:
            return [], list(tokenizer(continuation, add_special_tokens=False)["input_ids"])
        stripped = context.rstrip()
        if stripped:
            context, continuation = stripped, context[len(stripped) :] + continuation
        before, both = (list(tokenizer(text)["input_ids"]) for text in (context, context + continuation))
        appended = _appended(tokenizer)
        before = before[: len(before) - appended]
        return before, both[len(before) : len(both) - appended]

    def _first_token(self) -> int:
        """The token an empty context stands for: the one every text begins with."""
        tokenizer, config = self.tokenizer, self.blueprint.config
        known = (tokenizer.bos_token_id, tokenizer.eos_token_id) if tokenizer is not None else ()
        first = next((token for token in (*known, config.bos_token_id, *self.blueprint.eos_ids) if token is not None), None)
        if first is None:
            raise ValueError("the context is empty, and the model has no beginning or end token to put there: give a context")
        return first


def _identifier(data: dict[str, Any], index: int) -> str:
    identifier = data.get("id", index)
    if isinstance(identifier, bool) or not isinstance(identifier, str | int):
        raise ValueError(f"id must be a string or a whole number, not {type(identifier).__name__}")
    _check_text(str(identifier))
    return str(identifier)


def _check_text(text: str) -> None:
    """Raise ValueError for half a character, which JSON's escapes can spell and no tokenizer or file takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has half a character, {text[error.start]!a} at {error.start}: give both surrogates, or neither"
        ) from None


def _appended(tokenizer: Any) -> int:
    """How many special tokens `tokenizer` puts after a text."""
    plain, full = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    return next((count for count in range(len(full)) if full[: len(full) - count][-len(plain) :] == plain), 0)

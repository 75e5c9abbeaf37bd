"""When an output ends, and its text on the way there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dist_infer.config.sampling import SamplingParams

CONTEXT = 6  # tokens of the prompt that the first output token is decoded after, so that its leading space is right
PATIENCE = 16  # tokens after which a character is taken as broken rather than incomplete


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        """The text of `token_ids`."""
        ...


class Detokenizer:
    """Text of one sequence, a token at a time, at a cost a token that does not grow.

    Tokens are decoded in a short window after some that are already text, since what a token says depends on those
    before it. Text that ends in a replacement character waits: its character may still be completed.

    Args:
        tokenizer: A transformers tokenizer.
        prompt_ids: The prompt; its last tokens are the first context.
        skip_special_tokens: Whether special tokens give no text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window = list(prompt_ids[-CONTEXT:])
        self._told = len(self._window)  # tokens of the window whose text is out
        self._told_text = self._decode(self._window)

    def push(self, token: int) -> str:
        """Add a token; returns the text it completes, often that of the token, sometimes nothing yet."""
        self._window.append(token)
        text = self._decode(self._window)
        waiting = len(self._window) - self._told
        if waiting <= PATIENCE and (len(text) <= len(self._told_text) or text.endswith("\ufffd")):
            return ""
        return self._tell(text)

    def flush(self) -> str:
        """The text still waiting, incomplete characters and all; for the end of the sequence."""
        return self._tell(self._decode(self._window))

    def _tell(self, text: str) -> str:
        """What `text`, the window's, adds; the tokens just told become the context of the next."""
        new = text[len(self._told_text) :]
        self._window = self._window[self._told :]
        self._told = len(self._window)
        self._told_text = self._decode(self._window)
        return new

    def _decode(self, tokens: list[int]) -> str:
        """The text of `tokens`."""
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip_special_tokens, clean_up_tokenization_spaces=False)


@dataclass(frozen=True)
class Verdict:
    """What became of one token.

    Attributes:
        text: Text that may now be shown; it will not be taken back.
        finish_reason: "stop" (an end token, stop token or stop string), "length", or None to go on.
    """

    text: str
    finish_reason: str | None


class StopRule:
    """Decides after each token of one sequence whether it ends.

    End and stop tokens give no text. A stop string ends the text before it, wherever token boundaries lie; of several the one
    completed first. Neither counts until more than `min_tokens` tokens are there.

    Args:
        params: The request's parameters.
        prompt_len: Tokens of the prompt.
        model_len: Most tokens of prompt and output together.
        eos_ids: The model's end tokens.
        detokenizer: Makes the text; None where there is no tokenizer (no text then).

    Raises:
        ValueError: Stop strings without a tokenizer, or a prompt that leaves no room for output.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt_len: int,
        model_len: int,
        eos_ids: Sequence[int] = (),
        detokenizer: Detokenizer | None = None,
    ) -> None:
        p = params.resolved()
        self._stops = tuple(p.stop or ())
        if self._stops and detokenizer is None:
            raise ValueError(f"sampling.stop={list(self._stops)}: there is no tokenizer; give model.tokenizer, or stop_token_ids")
        if prompt_len >= model_len:
            raise ValueError(f"prompt of {prompt_len} tokens: the longest sequence is {model_len} tokens; give at most {model_len - 1}")
        self._ends = frozenset(p.stop_token_ids or ()) | frozenset(() if p.ignore_eos else eos_ids)
        self._min_tokens = p.min_tokens or 0
        self._max_tokens = min(p.max_tokens or model_len, model_len - prompt_len)
        self._detokenizer = detokenizer
        self._tokens = 0
        self._held = ""  # the end of the text, while it may begin a stop string
        self._released: list[str] = []

    def push(self, token: int) -> Verdict:
        """Take in a token just decided; not called again after a verdict that ends."""
        self._tokens += 1
        if token in self._ends and self._tokens > self._min_tokens:
            return self._finish("", "stop")
        text = self._detokenizer.push(token) if self._detokenizer else ""
        if self._tokens >= self._max_tokens:
            return self._finish(text, "length")
        shown, stopped = self._release(text)
        return Verdict(shown, "stop" if stopped else None)

    @property
    def text(self) -> str:
        """All text shown so far."""
        return "".join(self._released)

    @property
    def max_tokens(self) -> int:
        """Tokens after which the sequence ends whatever they are."""
        return self._max_tokens

    @property
    def tokens(self) -> int:
        """Tokens taken in, an end token included."""
        return self._tokens

    def _finish(self, text: str, reason: str) -> Verdict:
        """End with `text` and whatever waits, unless a stop string is in it."""
        if self._detokenizer:
            text += self._detokenizer.flush()
        shown, stopped = self._release(text)
        if stopped:
            return Verdict(shown, "stop")
        rest, self._held = self._held, ""
        self._released.append(rest)
        return Verdict(shown + rest, reason)

    def _release(self, new: str) -> tuple[str, bool]:
        """The text that `new` allows to be shown, and whether it completes a stop string."""
        text = self._held + new
        end = self._stop_in(text) if self._tokens > self._min_tokens else None
        if end is None:
            held = self._may_begin_stop(text)
            shown, self._held = text[: len(text) - held], text[len(text) - held :]
        else:
            shown, self._held = text[:end], ""
        self._released.append(shown)
        return shown, end is not None

    def _stop_in(self, text: str) -> int | None:
        """Where the stop string begins that is completed first in the new part of `text`, if any is."""
        found = []
        for stop in self._stops:
            at = text.find(stop, max(0, len(self._held) - len(stop) + 1))
            if at >= 0:
                found.append((at + len(stop), at))
        return min(found)[1] if found else None

    def _may_begin_stop(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = min(len(text), max((len(stop) for stop in self._stops), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(len(stop) > length and stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0

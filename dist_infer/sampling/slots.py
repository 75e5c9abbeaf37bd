"""The slot table: what every rank remembers of the sequences it samples for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dist_infer.config.sampling import SamplingParams
from dist_infer.model.transfer import to_device

GREEDY_BELOW = 1e-5  # a temperature below this is greedy: logits divided by less may overflow
NO_LOGPROBS = -1
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_INTS = ("sequence", "prompt_len", "top_k", "min_tokens", "logprobs")
_BANNED = 3 + len(_INTS) + 2 * len(_FLOATS) + 2  # where the banned ids start: after length, seed, scalars, two counts


@dataclass(frozen=True)
class SlotParams:
    """The numbers one sequence is sampled with; the defaults are greedy.

    Attributes:
        seed: 63-bit seed of the request's noise.
        sequence: Index of the sequence among those of its request.
        prompt_len: Tokens of the prompt; a token at position p is output number p - prompt_len.
        temperature: 0 is greedy.
        top_k: Tokens kept; 0 keeps all.
        top_p: Probability kept; 1 keeps all.
        min_p: Least probability kept, relative to the best token's; 0 keeps all.
        repetition_penalty: 1 is none.
        presence_penalty: 0 is none.
        frequency_penalty: 0 is none.
        min_tokens: Outputs before which `banned` ids cannot be chosen.
        banned: End and stop ids, ascending.
        logit_bias: (token id, addend) pairs, ascending by id.
        logprobs: How many best raw logprobs are wanted beside the token's own; -1 for none at all.
    """

    seed: int = 0
    sequence: int = 0
    prompt_len: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    banned: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int = NO_LOGPROBS

    @classmethod
    def of(
        cls,
        params: SamplingParams,
        *,
        seed: int,
        sequence: int = 0,
        prompt_len: int = 0,
        eos_ids: Sequence[int] = (),
        vocab_size: int | None = None,
    ) -> SlotParams:
        """The numeric form of `params`, for one sequence.

        Args:
            params: The request's parameters; silent ones take the fallbacks.
            seed: Used when `params` names no seed.
            sequence: Index of the sequence among the request's `n`.
            prompt_len: Tokens of its prompt.
            eos_ids: The model's end ids; not produced before `min_tokens`, ignored or not.
            vocab_size: End ids beyond it (a tokenizer may know more) are left out.
        """
        p = params.resolved()
        banned: set[int] = set()
        if p.min_tokens:
            banned = {i for i in (*(p.stop_token_ids or ()), *eos_ids) if vocab_size is None or i < vocab_size}
        return cls(
            seed=seed if p.seed is None else p.seed,
            sequence=sequence,
            prompt_len=prompt_len,
            top_k=max(p.top_k or 0, 0),
            min_tokens=p.min_tokens or 0,
            banned=tuple(sorted(banned)),
            logit_bias=tuple((i, float(b)) for i, b in sorted((p.logit_bias or {}).items())),
            logprobs=NO_LOGPROBS if p.logprobs is None else p.logprobs,
            **{name: float(getattr(p, name)) for name in _FLOATS},
        )

    @property
    def greedy(self) -> bool:
        """Whether the best token is always chosen."""
        return self.temperature < GREEDY_BELOW or self.top_k == 1

    @property
    def needs_tokens(self) -> bool:
        """Whether the ranks must know which tokens the sequence holds."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def pack(self) -> np.ndarray:
        """These numbers as int32 words, their number first, floats as the two words of a double."""
        parts = [
            np.array([self.seed], np.int64).view(np.int32),
            np.array([getattr(self, name) for name in _INTS], np.int32),
            _words([getattr(self, name) for name in _FLOATS]),
            np.array([len(self.banned), len(self.logit_bias), *self.banned, *(i for i, _ in self.logit_bias)], np.int32),
            _words([bias for _, bias in self.logit_bias]),
        ]
        body = np.concatenate(parts)
        return np.concatenate([np.array([len(body) + 1], np.int32), body])

    @classmethod
    def unpack(cls, words: np.ndarray) -> SlotParams:
        """The parameters packed at the start of `words`, whose first word says how many are theirs."""
        words = words[: int(words[0])]
        ints, floats = 3 + len(_INTS), _BANNED - 2
        banned, biased = words[floats:_BANNED].tolist()
        ids, biases = _BANNED + banned, _BANNED + banned + biased
        return cls(
            seed=int(words[1:3].copy().view(np.int64)[0]),
            banned=tuple(words[_BANNED:ids].tolist()),
            logit_bias=tuple(zip(words[ids:biases].tolist(), _doubles(words[biases:]), strict=True)),
            **dict(zip(_INTS, words[3:ints].tolist(), strict=True)),
            **dict(zip(_FLOATS, _doubles(words[ints:floats]), strict=True)),
        )


def _words(values: list[float]) -> np.ndarray:
    """The bits of `values` in double precision, two int32 words each."""
    return np.array(values, np.float64).view(np.int32)


def _doubles(words: np.ndarray) -> list[float]:
    """The values whose bits `words` holds."""
    return words.copy().view(np.float64).tolist()


@dataclass(frozen=True)
class Rows:
    """The rows of logits a rank computes in one step; row r belongs to slot `slots[r]`.

    Attributes:
        slots: Slot of each row's sequence.
        positions: Position of the token that each row decides or scores (tokens before it).
        targets: For each row the token id to score, or -1 for a row to sample; None when all sample.
    """

    slots: Sequence[int]
    positions: Sequence[int]
    targets: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.slots)

    def sampled(self, row: int) -> bool:
        """Whether `row` is to be sampled rather than scored."""
        return self.targets is None or self.targets[row] < 0


class SlotTable:
    """Sampling state of the sequences on one rank, a function of the Steps received.

    Args:
        slots: How many sequences may be admitted at once.
        first_token: First token id of this rank's vocabulary slice.
        vocab_local: Token ids in the slice.
        device: Where logits are.
    """

    def __init__(self, slots: int, first_token: int, vocab_local: int, device: torch.device | str) -> None:
        self.first_token = first_token
        self.vocab_local = vocab_local
        self.device = torch.device(device)
        self._params: list[SlotParams | None] = [None] * slots
        # Made when a sequence with penalties first comes.
        self._output_counts: Tensor | None = None  # [slots, vocab_local] int32
        self._in_prompt: Tensor | None = None  # [slots, vocab_local] bool

    def admit(self, slot: int, params: SlotParams, prompt_tokens: Sequence[int] = (), output_tokens: Sequence[int] = ()) -> None:
        """Fill `slot`; the tokens are needed only where `params.needs_tokens`.

        Args:
            slot: A free slot.
            params: The sequence's parameters.
            prompt_tokens: The prompt's token ids.
            output_tokens: Tokens already produced (a preempted sequence that comes back).
        """
        assert self._params[slot] is None, f"slot {slot} is taken"
        self._params[slot] = params
        if not params.needs_tokens:
            return
        if self._output_counts is None or self._in_prompt is None:
            shape = (len(self._params), self.vocab_local)
            self._output_counts = torch.zeros(shape, dtype=torch.int32, device=self.device)
            self._in_prompt = torch.zeros(shape, dtype=torch.bool, device=self.device)
        self._output_counts[slot] = 0
        self._in_prompt[slot] = False
        self._in_prompt[slot, self._own(prompt_tokens)] = True
        self.append([slot] * len(output_tokens), output_tokens)

    def append(self, slot_ids: Sequence[int], token_ids: Sequence[int]) -> None:
        """Count tokens just produced: token_ids[i] in slot slot_ids[i]."""
        last = self.first_token + self.vocab_local
        own = [
            (slot, token - self.first_token)
            for slot, token in zip(slot_ids, token_ids, strict=True)
            if self.first_token <= token < last and self[slot].needs_tokens
        ]
        if not own:
            return
        assert self._output_counts is not None
        at = to_device(own, self.device).T
        self._output_counts.index_put_((at[0], at[1]), torch.ones_like(at[0], dtype=torch.int32), accumulate=True)

    def free(self, slot: int) -> None:
        """Forget the sequence in `slot`."""
        self._params[slot] = None

    def __getitem__(self, slot: int) -> SlotParams:
        """The parameters of the sequence in `slot`."""
        params = self._params[slot]
        assert params is not None, f"slot {slot} is free"
        return params

    def tokens_of(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Of each slot the counts of output tokens and which tokens the prompt holds, [len(slots), vocab_local] each."""
        assert self._output_counts is not None and self._in_prompt is not None, "no sequence with penalties was admitted"
        return self._output_counts[slots], self._in_prompt[slots]

    def _own(self, tokens: Sequence[int]) -> Tensor:
        """Those of `tokens` in this rank's slice, as offsets into it."""
        offsets = np.array(tokens, dtype=np.int64) - self.first_token  # chosen here: a GPU would have to be waited for
        return to_device(offsets[(offsets >= 0) & (offsets < self.vocab_local)], self.device)

"""The wire form of sampling parameters and the slot table."""

from __future__ import annotations

import numpy as np
import torch

from dist_infer.config.sampling import SamplingParams
from dist_infer.sampling.slots import SlotParams, SlotTable

FULL = SlotParams(
    seed=2**63 - 1,
    sequence=7,
    prompt_len=131072,
    temperature=0.7,
    top_k=50,
    top_p=0.1 + 0.2,
    min_p=1e-9,
    repetition_penalty=1.1,
    presence_penalty=-0.3,
    frequency_penalty=0.4,
    min_tokens=3,
    banned=(2, 151645),
    logit_bias=((0, -100.0), (151935, 0.1)),
    logprobs=5,
)


def test_packed_parameters_come_back_the_same_among_other_words() -> None:
    for params in (FULL, SlotParams(), SlotParams(banned=(1,)), SlotParams(logit_bias=((3, 1.5),)), SlotParams(seed=1 << 40)):
        words = params.pack()
        assert words.dtype == np.int32
        assert words[0] == len(words)
        stream = np.concatenate([words, np.array([99, -1], np.int32)])
        assert SlotParams.unpack(stream) == params
    first, second = FULL.pack(), SlotParams(seed=4).pack()
    stream = np.concatenate([first, second])
    assert SlotParams.unpack(stream[int(stream[0]) :]) == SlotParams(seed=4)


def test_numeric_form_of_a_request() -> None:
    asked = SamplingParams(temperature=0.5, top_k=-1, min_tokens=2, stop_token_ids=[9, 4], logit_bias={8: 1.0, 3: -1.0}, logprobs=0)
    params = SlotParams.of(asked, seed=6, sequence=1, prompt_len=12, eos_ids=[2, 32000], vocab_size=32000)
    assert params == SlotParams(
        seed=6,
        sequence=1,
        prompt_len=12,
        temperature=0.5,
        min_tokens=2,
        banned=(2, 4, 9),
        logit_bias=((3, -1.0), (8, 1.0)),
        logprobs=0,
    )
    assert SlotParams.of(SamplingParams(seed=3), seed=6, eos_ids=[2]) == SlotParams(seed=3)
    assert SlotParams.of(SamplingParams(), seed=6).greedy
    assert SlotParams.of(SamplingParams(temperature=1.0, top_k=1), seed=6).greedy


def test_counts_follow_admissions_and_tokens_in_the_own_slice_only() -> None:
    table = SlotTable(3, first_token=10, vocab_local=5, device="cpu")
    table.admit(0, SlotParams())
    table.append([0], [12])  # no penalties, nothing to count
    table.admit(2, SlotParams(presence_penalty=1.0), prompt_tokens=[9, 10, 10, 15], output_tokens=[11, 11, 3, 14])
    table.append([0, 2, 2, 2], [11, 11, 12, 99])
    counts, in_prompt = table.tokens_of(torch.tensor([2]))
    assert counts.tolist() == [[0, 3, 1, 0, 1]]
    assert in_prompt.tolist() == [[True, False, False, False, False]]


def test_a_slot_starts_anew_for_each_sequence() -> None:
    table = SlotTable(1, first_token=0, vocab_local=4, device="cpu")
    table.admit(0, SlotParams(repetition_penalty=2.0), prompt_tokens=[1], output_tokens=[2])
    table.free(0)
    table.admit(0, SlotParams(frequency_penalty=1.0), prompt_tokens=[3])
    counts, in_prompt = table.tokens_of(torch.tensor([0]))
    assert counts.tolist() == [[0, 0, 0, 0]]
    assert in_prompt.tolist() == [[False, False, False, True]]
    assert table[0] == SlotParams(frequency_penalty=1.0)

"""Defaults from generation_config.json and the check of token ids."""

from __future__ import annotations

import pytest

from dist_infer.config.sampling import SamplingParams
from dist_infer.sampling.parameters import check, defaults_from_generation_config


def test_defaults_of_an_instruct_model() -> None:
    defaults = defaults_from_generation_config(
        {"bos_token_id": 1, "do_sample": True, "eos_token_id": [5, 6], "temperature": 0.6, "top_p": 0.9, "transformers_version": "4.43"}
    )
    assert defaults.params == SamplingParams(temperature=0.6, top_p=0.9)
    assert defaults.eos_ids == (5, 6)
    assert defaults.max_length is None
    assert defaults.warnings == []


def test_without_do_sample_the_default_is_greedy_but_filters_stay() -> None:
    assert defaults_from_generation_config({}).params == SamplingParams(temperature=0.0)
    defaults = defaults_from_generation_config({"do_sample": False, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05})
    assert defaults.params == SamplingParams(temperature=0.0, top_k=20, repetition_penalty=1.05)
    assert SamplingParams(temperature=0.9).over(defaults.params).top_k == 20


def test_sampling_without_a_temperature_is_at_one() -> None:
    assert defaults_from_generation_config({"do_sample": True}).params == SamplingParams(temperature=1.0)


def test_lengths() -> None:
    both = defaults_from_generation_config({"max_length": 100, "max_new_tokens": 7, "min_new_tokens": 2, "eos_token_id": 3})
    assert (both.params.max_tokens, both.params.min_tokens, both.max_length, both.eos_ids) == (7, 2, None, (3,))
    assert defaults_from_generation_config({"max_length": 100, "max_new_tokens": None}).max_length == 100


def test_what_is_not_supported_is_named() -> None:
    config = {
        "num_beams": 4,
        "no_repeat_ngram_size": 0,
        "typical_p": 1.0,
        "suppress_tokens": [],
        "bad_words_ids": [[1]],
        "length_penalty": 2.0,
    }
    warnings = defaults_from_generation_config(config).warnings
    assert len(warnings) == 2
    assert "num_beams=4" in warnings[1]
    assert "bad_words_ids=[[1]]" in warnings[0]


@pytest.mark.parametrize(
    "config", [{"top_p": 0.0}, {"do_sample": True, "temperature": -1}, {"top_k": "many"}, {"top_k": 1.5}, {"max_new_tokens": 0}]
)
def test_values_out_of_range_are_refused(config: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"generation_config\.json: .*must be"):
        defaults_from_generation_config(config)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(stop_token_ids=[3, 100]), r"sampling\.stop_token_ids: token id 100 .* 0 to 99"),
        (SamplingParams(logit_bias={-1: 2.0}), r"sampling\.logit_bias: token id -1"),
        (SamplingParams(logit_bias={1: float("nan")}), r"bias nan of token 1"),
    ],
)
def test_token_ids_outside_the_vocabulary_are_refused(params: SamplingParams, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(params, 100)


def test_token_ids_inside_the_vocabulary_pass() -> None:
    check(SamplingParams(stop_token_ids=[0, 99], logit_bias={99: -100.0}), 100)

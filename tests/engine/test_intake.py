"""From what users write to requests."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dist_infer.config.options import Options, read_options
from dist_infer.config.sampling import SamplingParams
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.intake import Intake
from dist_infer.model.config import ModelConfig
from dist_infer.sampling.parameters import defaults_from_generation_config

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools\nhere') }}{% endif %}<{{ m.content }}>{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)
CONFIG = ModelConfig("llama", 300, 64, 128, 2, 4, 2, 16, 1e-5, max_position=512, bos_token_id=1, eos_token_ids=(2,))


def byte_tokenizer(bos: bool = True, eos: bool = False, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A token a byte, beginning with <s> and perhaps ending with </s>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: index for index, letter in enumerate(letters, 3)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    single = f"{'<s> ' if bos else ''}$A{' </s>' if eos else ''}"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.chat_template = template
    return made


BYTES = byte_tokenizer()


def intake(
    tokenizer: Any = BYTES, options: Options | None = None, generation: dict[str, Any] | None = None, config: ModelConfig = CONFIG
) -> Intake:
    options = options or Options()
    if tokenizer is None:
        options.model.tokenizer = "none"
    defaults = defaults_from_generation_config(generation or {})
    return Intake(Blueprint(options, None, config, torch.float32, defaults, config.max_position, tokenizer))


def line(data: dict[str, Any], **changes: Any) -> Any:
    return intake(**changes).line(json.loads(json.dumps(data)), 4)


def text_of(request: Any) -> str:
    return BYTES.decode(request.token_ids)


def test_a_line_of_each_kind() -> None:
    request = line({"id": "a", "prompt": "hi ${x} 😀\n'yes' \"q\"", "sampling": {"max_tokens": 3, "logit_bias": {"5": -1}, "stop": "x"}})
    assert text_of(request) == "<s>hi ${x} 😀\n'yes' \"q\""
    assert (request.id, request.index, request.params.max_tokens) == ("a", 4, 3)
    assert (request.params.logit_bias, request.params.stop, request.params.temperature) == ({5: -1}, ["x"], 0.0)
    chat = line({"id": 7, "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    assert (BYTES.decode(chat.token_ids), chat.id) == ("<a><b>=", "7")
    tokens = line({"prompt_token_ids": [5, 6]})
    assert (tokens.token_ids, tokens.id) == ([5, 6], "4")


def test_token_ids_need_no_tokenizer() -> None:
    assert line({"prompt_token_ids": [5, 6]}, tokenizer=None).token_ids == [5, 6]


GOOD = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1], "a line must be a JSON object, not list"),
        ({"id": "a"}, "give one of prompt, messages, prompt_token_ids; this line has none"),
        ({"prompt": "a", "messages": []}, "give one of prompt, messages, prompt_token_ids; this line has prompt and messages"),
        (
            {"prompt": "a", "temperature": 1},
            "'temperature': there is no such field; known are id, sampling, prompt, messages, prompt_token_ids",
        ),
        ({"prompt": ["a"]}, "prompt must be a string, not list"),
        ({"prompt": None}, "prompt must be a string, not NoneType"),
        ({"prompt": ""}, "the prompt is empty: give some text"),
        ({"messages": "hi"}, "messages must be a list, not str"),
        ({"messages": []}, "messages is empty: give at least one message"),
        ({"messages": ["hi"]}, "each message must have a role and a content, both strings"),
        ({"messages": [GOOD, {"role": "user"}]}, "each message must have a role and a content, both strings"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "the chat template refuses these messages: no tools here"),
        ({"prompt_token_ids": "5"}, "prompt_token_ids must be a list, not str"),
        ({"prompt_token_ids": [5, 300]}, "prompt_token_ids: 300 is no token id; the model's are 0 to 299"),
        ({"prompt_token_ids": [-1]}, "prompt_token_ids: -1 is no token id; the model's are 0 to 299"),
        ({"prompt_token_ids": [1.0]}, "prompt_token_ids: 1.0 is no token id; the model's are 0 to 299"),
        ({"prompt_token_ids": [True]}, "prompt_token_ids: True is no token id; the model's are 0 to 299"),
        ({"id": None, "prompt": "a"}, "id must be a string or a whole number, not NoneType"),
        ({"id": 1.5, "prompt": "a"}, "id must be a string or a whole number, not float"),
        ({"id": True, "prompt": "a"}, "id must be a string or a whole number, not bool"),
        ({"prompt": "a", "sampling": None}, "sampling must be an object, not NoneType"),
        ({"prompt": "a", "sampling": {"temprature": 1}}, "sampling.temprature: there is no such parameter; did you mean temperature?"),
        ({"prompt": "a", "sampling": {"zzz": 1}}, "sampling.zzz: there is no such parameter"),
        ({"prompt": "a", "sampling": {"temperature": "hot"}}, "sampling.temperature='hot': must be a number"),
        ({"prompt": "a", "sampling": {"temperature": -1}}, "sampling.temperature=-1: must be at least 0"),
        ({"prompt": "a", "sampling": {"top_p": 0}}, "sampling.top_p=0: must be greater than 0"),
        ({"prompt": "a", "sampling": {"top_k": 2**31}}, "sampling.top_k=2147483648: must be at most 2147483647"),
        ({"prompt": "a", "sampling": {"n": 1.5}}, "sampling.n=1.5: must be a whole number"),
        ({"prompt": "a", "sampling": {"max_tokens": True}}, "sampling.max_tokens=True: must be a whole number"),
        ({"prompt": "a", "sampling": {"stop": 5}}, "sampling.stop=5: must be a list of texts"),
        ({"prompt": "a", "sampling": {"stop": ["a", 5]}}, "sampling.stop=['a', 5]: must be a list of texts"),
        ({"prompt": "a", "sampling": {"stop": ""}}, "sampling.stop: an empty string would stop at once; give non-empty strings"),
        ({"prompt": "a", "sampling": {"ignore_eos": 1}}, "sampling.ignore_eos=1: must be true or false"),
        ({"prompt": "a", "sampling": {"min_tokens": 3, "max_tokens": 2}}, "sampling.min_tokens=3: must be at most max_tokens=2"),
        (
            {"prompt": "a", "sampling": {"stop_token_ids": [300]}},
            "sampling.stop_token_ids: token id 300 is not in the vocabulary; valid are 0 to 299",
        ),
        (
            {"prompt": "a", "sampling": {"logit_bias": {"x": 1}}},
            "sampling.logit_bias={'x': 1}: must be whole numbers, each with a number",
        ),
        (
            {"prompt": "a", "sampling": {"logit_bias": {"5": None}}},
            "sampling.logit_bias={5: None}: must be whole numbers, each with a number",
        ),
        (
            {"prompt": "a", "sampling": {"logit_bias": {"300": 1}}},
            "sampling.logit_bias: token id 300 is not in the vocabulary; valid are 0 to 299",
        ),
    ],
)
def test_a_bad_line_says_what_is_wrong(data: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        line(data)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("data", "purpose"),
    [
        ({"prompt": "a"}, "a text prompt"),
        ({"messages": [GOOD]}, "a chat"),
        ({"prompt_token_ids": [1], "sampling": {"stop": "a"}}, "sampling.stop"),
    ],
)
def test_text_without_a_tokenizer(data: dict[str, Any], purpose: str) -> None:
    with pytest.raises(ValueError, match=rf"^no tokenizer beside the model, and {purpose} needs one: give model\.tokenizer"):
        line(data, tokenizer=None)


def test_a_chat_without_a_template() -> None:
    with pytest.raises(ValueError, match=r"^the model's tokenizer has no chat template: give a prompt instead of messages$"):
        line({"messages": [GOOD]}, tokenizer=byte_tokenizer(template=None))


@pytest.mark.parametrize(
    "text", ['{"prompt": "a\\ud800"}', '{"messages": [{"role": "user", "content": "a\\ud800"}]}', '{"prompt": "b", "id": "a\\ud800"}']
)
def test_half_a_character_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^the text has half a character, '\\ud800' at 1: give both surrogates, or neither$"):
        intake().line(json.loads(text), 0)
    with pytest.raises(ValueError, match="half a character"):
        intake().score("a", "\ud800")


def test_parameters_of_the_line_over_the_runs_over_the_models() -> None:
    options = read_options(["sampling.top_k=7", "sampling.seed=5", "sampling.top_p=0.5"])
    generation = {"do_sample": True, "temperature": 0.6, "top_k": 3, "min_new_tokens": 4}
    request = line({"prompt": "a", "sampling": {"top_p": 0.9}}, options=options, generation=generation)
    p = request.params
    assert (p.top_p, p.top_k, p.temperature, p.min_tokens, p.seed, request.seed) == (0.9, 7, 0.6, 4, 5, 5)
    assert line({"prompt": "a", "sampling": {"max_tokens": 2}}, options=options, generation=generation).params.min_tokens == 2


def test_the_models_total_length_leaves_so_many_tokens() -> None:
    generation = {"max_length": 10, "min_new_tokens": 4}
    for length, max_tokens, min_tokens in ((4, 6, 4), (7, 3, 3), (20, 1, 1)):
        params = line({"prompt_token_ids": [5] * length}, generation=generation).params
        assert (params.max_tokens, params.min_tokens) == (max_tokens, min_tokens)
    assert line({"prompt_token_ids": [5], "sampling": {"max_tokens": 50}}, generation=generation).params.max_tokens == 50


def test_seeds_are_drawn_for_each_request() -> None:
    maker = intake()
    seeds = {maker.request([5]).seed for _ in range(20)}
    assert len(seeds) == 20 and all(0 <= seed < 2**63 for seed in seeds)


def test_prompts_from_python() -> None:
    maker = intake()
    assert BYTES.decode(maker.request("a").token_ids) == "<s>a"
    assert BYTES.decode(maker.request([GOOD]).token_ids) == "<a>="
    assert maker.request((5, 6), SamplingParams(n=2), "x", 3).token_ids == [5, 6]
    assert maker.request([]).token_ids == []  # refused by the engine, as a request of its own


def scored(context: Any, continuation: Any, **changes: Any) -> tuple[list[int], list[int]]:
    request = intake(**changes).score(context, continuation)
    assert request.score_from is not None
    return request.token_ids[: request.score_from], request.token_ids[request.score_from :]


def test_context_and_continuation_as_text() -> None:
    def parts(*texts: str, tokenizer: Any = BYTES) -> tuple[str, str]:
        before, after = scored(*texts, tokenizer=tokenizer)
        return BYTES.decode(before), BYTES.decode(after)

    assert parts("ab", "cd") == ("<s>ab", "cd")
    assert parts("ab  ", "cd") == ("<s>ab", "  cd")  # spaces belong to the continuation
    assert parts("", "cd") == ("<s>", "cd")
    assert parts(" ", "cd") == ("<s> ", "cd")
    assert parts("ab", "cd", tokenizer=byte_tokenizer(eos=True)) == ("<s>ab", "cd")
    assert parts("ab</s>", "cd</s>", tokenizer=byte_tokenizer(eos=True)) == ("<s>ab</s>", "cd</s>")
    assert parts("ab</s>", "cd") == ("<s>ab</s>", "cd")
    assert parts("ab", "cd", tokenizer=byte_tokenizer(bos=False)) == ("ab", "cd")


def test_context_and_continuation_as_token_ids() -> None:
    assert scored([5], [6, 7], tokenizer=None) == ([5], [6, 7])
    assert scored([], [6, 7], tokenizer=None) == ([1], [6, 7])  # the configuration knows how a text begins


def test_a_model_without_a_beginning_needs_a_context() -> None:
    config = ModelConfig("llama", 300, 64, 128, 2, 4, 2, 16, 1e-5, max_position=512)
    with pytest.raises(ValueError, match=r"^the context is empty, and the model has no beginning or end token to put there"):
        scored([], [6], tokenizer=None, config=config)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"context": "a"}, "give context and continuation, or context_token_ids and continuation_token_ids"),
        ({"context": "a", "continuation_token_ids": [5]}, "give context and continuation, or context_token_ids and continuation_token_ids"),
        ({"context": "a", "continuation": ["b"]}, "context and continuation must be strings"),
        (
            {"context_token_ids": "a", "continuation_token_ids": [5]},
            "context_token_ids and continuation_token_ids must be lists of token ids",
        ),
        ({"context": "a", "continuation": ""}, "the continuation is empty: give some text to score"),
        ({"context_token_ids": [5], "continuation_token_ids": []}, "the continuation is empty: give at least one token to score"),
        (
            {"context_token_ids": [5], "continuation_token_ids": [300]},
            "continuation_token_ids: 300 is no token id; the model's are 0 to 299",
        ),
        ({"context_token_ids": [None], "continuation_token_ids": [5]}, "context_token_ids: None is no token id; the model's are 0 to 299"),
        (
            {"context": "a", "continuation": "b", "sampling": {}},
            "'sampling': there is no such field; known are id, context, continuation, context_token_ids, continuation_token_ids",
        ),
        ("a", "a line must be a JSON object, not str"),
    ],
)
def test_a_bad_line_to_score_says_what_is_wrong(data: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        intake().score_line(data, 0)
    assert str(caught.value) == message


def test_text_and_token_ids_do_not_mix() -> None:
    with pytest.raises(ValueError, match=r"^context and continuation must both be text or both be token ids$"):
        intake().score("a", [5])


def test_lines_to_score() -> None:
    request = intake().score_line({"id": "q", "context": "ab", "continuation": "c"}, 3)
    assert (request.id, request.index, request.score_from) == ("q", 3, 3)
    assert intake().score_line({"context_token_ids": [5], "continuation_token_ids": [6]}, 3).id == "3"

"""Options: defaults, a YAML file, `key=value` overrides, and what is said of mistakes."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from dist_infer.config.options import Options, known_keys, read_options
from dist_infer.config.sampling import FALLBACK, SamplingParams

TEXTS = ["yes", "${x}", "1e3", "~", "null", 'it\'s "quoted"', "two\nlines\ttab", "😀 ünïcode", "# no comment", "a: b", "{x}", "", " "]


def from_yaml(tmp_path: Path, text: str, *overrides: str) -> Options:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return read_options(overrides, str(file))


def test_defaults() -> None:
    assert read_options() == Options()


def test_overrides() -> None:
    options = read_options(
        [
            "model.path=runs/step_5",
            "parallel.tp=2",
            "engine.kv_cache_gib=1e-3",
            "engine.prefix_cache=false",
            "sampling.logit_bias={5: -1, 7: 2.5}",
        ]
    )
    assert (options.model.path, options.parallel.tp, options.engine.kv_cache_gib) == ("runs/step_5", 2, 0.001)
    assert options.engine.prefix_cache is False
    assert options.sampling.logit_bias == {5: -1.0, 7: 2.5}
    assert read_options(["engine.max_model_len=null"]).engine.max_model_len is None
    assert read_options(["parallel.tp=2", "parallel.tp=4"]).parallel.tp == 4


def test_overrides_go_over_the_file(tmp_path: Path) -> None:
    text = "model:\n  path: a\nparallel: {tp: 2, fsdp: 3}\nprompts: [file]\nsampling:\n"
    options = from_yaml(tmp_path, text, "parallel.tp=4", "prompts=line")
    assert (options.model.path, options.parallel.tp, options.parallel.fsdp, options.prompts) == ("a", 4, 3, ["line"])
    assert from_yaml(tmp_path, "") == from_yaml(tmp_path, "engine:\nprompts:\n") == Options()


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_is_text(text: str, tmp_path: Path) -> None:
    quoted = json.dumps(text, ensure_ascii=False)
    assert read_options([f"prompts={text}"]).prompts == [text]
    assert read_options([f"prompts={json.dumps([text, 'b'])}"]).prompts == [text, "b"]
    assert read_options([f"prompts=[{quoted}]"]).prompts == [text]
    assert read_options([f"system={text}"]).system == text
    if text:
        assert read_options([f"sampling.stop={text}"]).sampling.stop == [text]
        assert from_yaml(tmp_path, f"sampling: {{stop: {quoted}}}").sampling.stop == [text]
    assert from_yaml(tmp_path, f"prompts: [b, {quoted}]").prompts == ["b", text]


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("[a, b]", ["a", "b"]),
        ("[yes, 1e3, 'q']", ["yes", "1e3", "q"]),
        ('["a", 1]', ["a", "1"]),
        ("[]", []),
        ("[INST] hi [/INST]", ["[INST] hi [/INST]"]),
        ("[1, [2]]", ["[1, [2]]"]),
        ("[", ["["]),
    ],
)
def test_a_list_of_prompts_is_json_or_plain_and_all_else_one_prompt(text: str, prompts: list[str]) -> None:
    assert read_options([f"prompts={text}"]).prompts == prompts


def test_yaml_does_not_guess_at_text(tmp_path: Path) -> None:
    text = "prompts:\n  - yes\n  - 1e3\n  - 2024_01\n  - ~\n  - ${x} is\n  - |\n    two\n    lines\nsystem: on\nsampling:\n  stop: no\n"
    options = from_yaml(tmp_path, text)
    assert options.prompts == ["yes", "1e3", "2024_01", "~", "${x} is", "two\nlines\n"]
    assert (options.system, options.sampling.stop) == ("on", ["no"])
    assert from_yaml(tmp_path, "prompts: one text").prompts == ["one text"]


@pytest.mark.parametrize("path", ["2024_01", "007", "yes", "1e3", "a: b", "~/runs", "[x]", "12:30:00"])
def test_a_path_is_not_guessed_at(path: str, tmp_path: Path) -> None:
    assert read_options([f"model.path={path}"]).model.path == path
    assert from_yaml(tmp_path, f"output: '{path}'").output == path
    assert from_yaml(tmp_path, "model: {path: 2024_01, tokenizer: 007, config: null}").model.path == "2024_01"
    assert read_options(["model.path=null", "output="]) == Options()


def test_a_path_may_refer_to_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/fast")
    assert from_yaml(tmp_path, "model: {path: '${oc.env:SCRATCH}/run'}").model.path == "/fast/run"
    assert read_options(["input=${oc.env:SCRATCH}/in.jsonl"]).input == "/fast/in.jsonl"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("foo", "'foo': an option is key=value, such as model.path=DIRECTORY"),
        ("engine.blocksize=3", "engine.blocksize: there is no such option; did you mean engine.block_size?"),
        ("tp=3", "tp: there is no such option; did you mean parallel.tp?"),
        ("modle.path=x", "modle.path: there is no such option; did you mean model.path?"),
        ("prompt=x", "prompt: there is no such option; did you mean prompts?"),
        ("zzzzzz=3", "zzzzzz: there is no such option; --help lists the valid ones"),
        ("model.path.x=3", "model.path.x: there is no such option; did you mean model.path?"),
        ("sampling.logit_bias.5=1", "sampling.logit_bias.5: there is no such option; did you mean sampling.logit_bias?"),
        ("engine={block_size: 4}", "engine: there is no such option; did you mean engine.overlap?"),
        ("engine.block_size=abc", "engine.block_size: Value 'abc' of type 'str' could not be converted to Integer"),
        ("engine.block_size=1.5", "engine.block_size: Value '1.5' of type 'float' could not be converted to Integer"),
        ("engine.prefix_cache=maybe", "engine.prefix_cache: Value 'maybe' is not a valid bool (type str)"),
        ("engine.block_size=0", "engine.block_size=0: must be at least 1"),
        ("engine.block_size=1025", "engine.block_size=1025: must be at most 1024"),
        ("engine.kv_cache_gib=0", "engine.kv_cache_gib=0.0: must be greater than 0"),
        ("engine.kv_cache_gib=nan", "engine.kv_cache_gib=nan: must be a finite number"),
        ("engine.kv_cache_gib=inf", "engine.kv_cache_gib=inf: must be a finite number"),
        ("device=tpu", "device='tpu': must be one of auto, cpu, cuda"),
        ("model.dtype=int8", "model.dtype='int8': must be one of auto, float32, bfloat16, float16"),
        ("parallel.tp=0", "parallel.tp=0: must be at least 1"),
        ("sampling.temperature=-1", "sampling.temperature=-1.0: must be at least 0"),
        ("sampling.top_p=0", "sampling.top_p=0.0: must be greater than 0"),
        ("sampling.top_p=1.01", "sampling.top_p=1.01: must be at most 1"),
        ("sampling.top_k=-2", "sampling.top_k=-2: must be at least -1"),
        ("sampling.min_p=2", "sampling.min_p=2.0: must be at most 1"),
        ("sampling.repetition_penalty=0", "sampling.repetition_penalty=0.0: must be greater than 0"),
        ("sampling.presence_penalty=3", "sampling.presence_penalty=3.0: must be at most 2"),
        ("sampling.n=0", "sampling.n=0: must be at least 1"),
        ("sampling.max_tokens=0", "sampling.max_tokens=0: must be at least 1"),
        ("sampling.logprobs=65", "sampling.logprobs=65: must be at most 64"),
        ("sampling.seed=-1", "sampling.seed=-1: must be at least 0"),
        ("sampling.seed=9223372036854775808", "sampling.seed=9223372036854775808: must be at most 9223372036854775807"),
        ("sampling.stop_token_ids=[a]", "sampling.stop_token_ids[0]: Value 'a' of type 'str' could not be converted to Integer"),
        ("sampling.logit_bias=5", "sampling.logit_bias: Cannot assign int to Dict[int, float]"),
        ('sampling.stop=["a", ""]', "sampling.stop: an empty string would stop at once; give non-empty strings"),
        ("model.path=${x}", "model.path: Interpolation key 'x' not found"),
    ],
)
def test_a_mistake_is_one_line(override: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_options([override])
    assert str(caught.value) == message


def test_parameters_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match=r"^sampling\.min_tokens=3: must be at most max_tokens=2$"):
        read_options(["sampling.max_tokens=2", "sampling.min_tokens=3"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "--config {}: must hold options by name, such as 'model:' and 'parallel:' sections"),
        ("word", "--config {}: must hold options by name, such as 'model:' and 'parallel:' sections"),
        ("model: 5", "model: there is no such option; did you mean model.step?"),
        ("model: {pth: x}", "model.pth: there is no such option; did you mean model.path?"),
        ("sampling.seed: 3", "--config {}: sampling.seed: write a section, 'sampling:' and below it 'seed:'"),
        ("prompts: {a: b}", "prompts=[{{'a': 'b'}}]: must be a list of texts"),
        ("prompts: [[a]]", "prompts=[['a']]: must be a list of texts"),
        ("system: [a]", "system=['a']: must be text"),
        ("sampling: {top_p: 2}", "sampling.top_p=2.0: must be at most 1"),
        ("sampling: {temperature: hot}", "sampling.temperature: Value 'hot' of type 'str' could not be converted to Float"),
        ("1: 2", "1: there is no such option; --help lists the valid ones"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        from_yaml(tmp_path, text)
    assert str(caught.value) == message.format(tmp_path / "run.yaml")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^--config nowhere\.yaml: No such file or directory$"):
        read_options([], "nowhere.yaml")
    with pytest.raises(FileNotFoundError, match=r"^--config .*: Is a directory$"):
        read_options([], str(tmp_path))
    with pytest.raises(ValueError, match=r"^--config .*run\.yaml: while parsing [^\n]*$"):
        from_yaml(tmp_path, "model: [")
    (tmp_path / "latin.yaml").write_bytes(b"system: \xe9\n")
    with pytest.raises(ValueError, match=r"^--config .*latin\.yaml: not UTF-8 text \(.* at byte 8\)$"):
        read_options([], str(tmp_path / "latin.yaml"))


def test_options_travel_as_json() -> None:
    options = read_options(["sampling.logit_bias={5: -1}", "sampling.stop=${x}", "prompts=[yes, b]", "parallel.tp=2", "model.path=007"])
    assert Options.from_json(json.loads(json.dumps(options.to_json()))) == options
    assert Options.from_json(json.loads(json.dumps(Options().to_json()))) == Options()


def test_every_option_is_documented() -> None:
    for key, item in known_keys().items():
        assert item.metadata.get("doc"), key


def test_what_differs_from_the_defaults() -> None:
    options = read_options(["parallel.tp=2", "prompts=a", "output=b", "sampling.seed=3", "engine.block_size=16"])
    assert options.changed() == {"parallel.tp": 2, "sampling.seed": 3}


def test_parameters_over_defaults() -> None:
    assert SamplingParams(top_k=3).over(SamplingParams(top_k=5, top_p=0.5)) == SamplingParams(top_k=3, top_p=0.5)
    assert SamplingParams(temperature=0.0).over(SamplingParams(temperature=1.0)).temperature == 0.0
    assert SamplingParams(stop=[]).over(SamplingParams(stop=["a"])).stop == []


def test_max_tokens_goes_before_a_default_min_tokens() -> None:
    defaults = SamplingParams(min_tokens=5, max_tokens=20)
    assert SamplingParams(max_tokens=3).over(defaults) == SamplingParams(min_tokens=3, max_tokens=3)
    assert SamplingParams(max_tokens=8).over(defaults) == SamplingParams(min_tokens=5, max_tokens=8)
    assert SamplingParams().over(defaults) == defaults
    with pytest.raises(ValueError, match=r"^sampling\.min_tokens=30: must be at most max_tokens=20$"):
        SamplingParams(min_tokens=30).over(defaults)


def test_fallbacks_fill_all_but_what_may_stay_open() -> None:
    resolved = SamplingParams().resolved()
    assert {f.name for f in fields(resolved) if getattr(resolved, f.name) is None} == {"max_tokens", "logprobs", "seed"}
    assert all(getattr(resolved, name) == value for name, value in FALLBACK.items())


@pytest.mark.parametrize(
    ("name", "value", "valid"),
    [
        ("temperature", "hot", "a number"),
        ("temperature", True, "a number"),
        ("n", 2.0, "a whole number"),
        ("seed", "5", "a whole number"),
        ("ignore_eos", 1, "true or false"),
        ("stop", 5, "a list of texts"),
        ("stop", [b"x"], "a list of texts"),
        ("stop_token_ids", 5, "a list of whole numbers"),
        ("logit_bias", [5], "whole numbers, each with a number"),
        ("logit_bias", {"5": 1.0}, "whole numbers, each with a number"),
    ],
)
def test_a_value_of_the_wrong_type(name: str, value: object, valid: str) -> None:
    with pytest.raises(ValueError) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert str(caught.value) == f"sampling.{name}={value!r}: must be {valid}"


def test_values_of_the_right_type() -> None:
    params = SamplingParams(temperature=1, stop="a", stop_token_ids=(1, 2), logit_bias={5: 1})  # type: ignore[arg-type]
    assert params.stop == ["a"]

"""The commands on one rank, in this process."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dist_infer.cli.main import main
from dist_infer.cli.terminal import Terminal
from dist_infer.engine.engine import Delta

ROOT = Path(__file__).parents[2]
QUICKSTART = f"model.path={ROOT / 'examples/quickstart/run'}"


def write(path: Path, lines: list[Any]) -> Path:
    """A JSONL file; strings are written as they are."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_prompts_stream_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", QUICKSTART, 'prompts=["What is 12 + 7?", "", "What is the capital of Norway?"]']) == 0
    said = capsys.readouterr()
    assert said.out == (
        "> What is 12 + 7?\n 12 + 7 = 19.\n> \n[error: the prompt is empty: give some text]\n"
        "> What is the capital of Norway?\n The capital of Norway is Oslo.\n"
    )
    last = said.err.splitlines()[-1]
    assert all(word in last for word in ("792K parameters", "tp=1", "GB/s", "prefill", "decode", "tokens/s"))


def test_prompts_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    strange = ["${x}", "yes", 'it\'s "quoted"', "🙂 emoji", "two\nlines", "1e3"]
    assert main(["generate", QUICKSTART, f"prompts={json.dumps(strange, ensure_ascii=False)}", "sampling.max_tokens=1"]) == 0
    out = capsys.readouterr().out
    assert all(f"> {prompt}\n" in out for prompt in strange) and "error" not in out


def test_file_of_every_kind_of_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        {"id": "text", "prompt": "What is 2 + 3?"},
        "{not json",
        {"id": "chat", "messages": [{"role": "user", "content": "What is 4 + 4?"}]},
        "",
        {"id": "tokens", "prompt_token_ids": [0, 274, 263], "sampling": {"max_tokens": 3, "ignore_eos": True, "logprobs": 2, "n": 2}},
        {"id": "empty", "prompt": ""},
        {"id": "long", "prompt_token_ids": [5] * 256},
        {"id": "none"},
        {"id": "typo", "prompt": "x", "sampling": {"temprature": 1}},
        {"id": "range", "prompt": "x", "sampling": {"top_p": 7}},
        {"id": "ids", "prompt_token_ids": [99999]},
        {"id": "type", "prompt": 5},
        {"id": "last", "prompt": "What is 5 + 5?"},
    ]
    output = tmp_path / "out.jsonl"
    assert main(["generate", QUICKSTART, f"input={write(tmp_path / 'in.jsonl', lines)}", f"output={output}"]) == 0
    results = read(output)
    assert [line["id"] for line in results] == [
        "text",
        "1",
        "chat",
        "tokens",
        "empty",
        "long",
        "none",
        "typo",
        "range",
        "ids",
        "type",
        "last",
    ]
    errors = {line["id"]: (line["line"], line["error"]) for line in results if "error" in line}
    assert {key: number for key, (number, _) in errors.items()} == {
        "1": 2, "empty": 6, "long": 7, "none": 8, "typo": 9, "range": 10, "ids": 11, "type": 12,
    }  # fmt: skip
    assert "did you mean temperature?" in errors["typo"][1] and "at most 255 fit" in errors["long"][1]
    good = {line["id"]: line for line in results if "error" not in line}
    assert good["text"]["outputs"][0]["text"] == " 2 + 3 = 5." and good["last"]["outputs"][0]["text"] == " 5 + 5 = 10."
    assert good["chat"]["outputs"][0]["text"] == " 4 + 4 = 8." and good["chat"]["outputs"][0]["finish_reason"] == "stop"
    first, second = good["tokens"]["outputs"]
    assert len(first["token_ids"]) == len(second["token_ids"]) == 3 and first["finish_reason"] == "length"
    assert len(first["logprobs"]) == 3 and len(first["logprobs"][0]["top"]) == 2
    assert good["text"]["usage"] == {"prompt_tokens": 7, "completion_tokens": 7, "cached_tokens": 0}
    for name in ("schema", "key", "seed", "attempt", "provenance"):
        assert name in good["text"]
    assert good["text"]["provenance"]["identity"] and good["text"]["provenance"]["topology"]["tp"] == 1
    assert not (tmp_path / "out.jsonl.partial").exists()
    assert "8 of 12 requests failed" in capsys.readouterr().err


def test_a_run_that_was_cut_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"id": f"q{i}", "prompt": f"What is {i} + 1?", "sampling": {"temperature": 1.0, "seed": i}} for i in range(6)]
    source, output = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert main(["generate", QUICKSTART, f"input={source}", f"output={output}"]) == 0
    whole = read(output)
    # What a killed run leaves: some lines, one of them of other parameters, the last one torn.
    foreign = {**whole[3], "key": "of another request"}
    partial = write(tmp_path / "out.jsonl.partial", [whole[4], foreign, whole[1]])
    with partial.open("a") as file:
        file.write(json.dumps(whole[5])[:40])
    output.unlink()
    capsys.readouterr()
    assert main(["generate", QUICKSTART, f"input={source}", f"output={output}"]) == 0
    again = read(output)
    assert "going on after 2 of 6 requests" in capsys.readouterr().err
    assert [line["attempt"] for line in again] == [2, 1, 2, 2, 1, 2]
    assert [line["outputs"] for line in again] == [line["outputs"] for line in whole]


def test_score(tmp_path: Path) -> None:
    lines = [
        {"id": "right", "context": "What is 6 + 7?", "continuation": " 6 + 7 = 13."},
        {"id": "wrong", "context": "What is 6 + 7?", "continuation": " 6 + 7 = 14."},
        {"id": "ids", "context_token_ids": [0, 274], "continuation_token_ids": [263, 270]},
        {"id": "no context", "context": "", "continuation": "What is"},
        {"id": "no ids before", "context_token_ids": [], "continuation_token_ids": [274]},
        {"id": "nothing", "context": "What", "continuation": ""},
        {"id": "half", "context": "What"},
    ]
    output = tmp_path / "out.jsonl"
    assert main(["score", QUICKSTART, f"input={write(tmp_path / 'in.jsonl', lines)}", f"output={output}"]) == 0
    right, wrong, ids, no_context, no_ids, nothing, half = read(output)
    assert right["is_greedy"] and not wrong["is_greedy"] and right["logprob"] > wrong["logprob"]
    assert right["logprob"] == pytest.approx(sum(right["token_logprobs"])) and len(ids["token_logprobs"]) == 2
    assert len(no_context["token_logprobs"]) >= 1 and len(no_ids["token_logprobs"]) == 1
    assert "empty" in nothing["error"] and half["line"] == 7


def test_chat_keeps_the_conversation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    talk = "What is 3 + 4?\nWhat is 10 + 11?\n" + "x" * 400 + "\nWhat is 1 + 2?\n/reset\nWhat is 2 + 2?\n/exit\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(talk))
    assert main(["chat", QUICKSTART, "engine.block_size=4"]) == 0
    said = capsys.readouterr()
    assert said.out == " 3 + 4 = 7.\n 10 + 11 = 21.\n 1 + 2 = 3.\n 2 + 2 = 4.\n"
    assert "this turn is dropped" in said.err


def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", QUICKSTART, "parallel.tp=2", "parallel.fsdp=2"]) == 0
    out = capsys.readouterr().out
    assert "dcp, 4 files" in out and "791,680 elements" in out and "every weight of the model is there" in out
    assert out.count("198,208") == 4


def test_a_cut_answer_ends_its_line() -> None:
    """So that the error after it stands on a line of its own."""
    stream = io.StringIO()
    terminal = Terminal(stream, ["Hello"])
    request = SimpleNamespace(index=0)
    terminal.take([Delta(request, 0, " wor", 5, None)], [])  # type: ignore[arg-type]
    terminal.close()
    assert stream.getvalue() == " wor\n"

"""The quickstart model through the whole engine: it answers right, and better at every saved step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_infer import LLM

EXAMPLE = Path(__file__).parents[2] / "examples/quickstart"
QUESTIONS = [json.loads(line) for line in (EXAMPLE / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
STEPS = sorted(int(path.name.removeprefix("step_")) for path in (EXAMPLE / "run").glob("step_*"))


def accuracy(step: int) -> float:
    """Part of the questions that the checkpoint of `step` answers right to the last character."""
    with LLM(str(EXAMPLE / f"run/step_{step}"), overrides=["device=cpu"]) as llm:
        results = llm.generate([question["prompt"] for question in QUESTIONS])
    right = [r.outputs[0].text == q["answer"] for r, q in zip(results, QUESTIONS, strict=True)]
    return sum(right) / len(right)


def test_accuracy_rises_over_the_saved_steps() -> None:
    scores = [accuracy(step) for step in STEPS]
    assert len(scores) >= 4 and scores[0] < 0.1 and scores[-1] >= 0.95
    assert scores == sorted(scores)


def test_a_hugging_face_id_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    model = tmp_path / "models--maker--name"
    snapshot = model / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs/main").write_text("0" * 40)
    fixture = Path(__file__).parents[1] / "data/fixtures/hf_qwen2"
    for file in fixture.iterdir():
        (snapshot / file.name).symlink_to(file)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with LLM("maker/name", overrides=["device=cpu"]) as llm:
        assert len(llm.generate([[1, 2, 3]])[0].outputs[0].token_ids) == 253
    with pytest.raises(FileNotFoundError, match="maker/other: no such path, and no such Hugging Face model"):
        LLM("maker/other")

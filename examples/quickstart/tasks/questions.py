"""Questions for the quickstart model as lm-evaluation-harness takes them: data sets of the two tasks beside this file."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

from datasets import Dataset

QUESTIONS = Path(__file__).parents[1] / "questions.jsonl"
COUNT = 20  # of each kind


def choices(**_: Any) -> dict[str, Dataset]:
    """Sums and capitals, each with four answers of which one is right."""
    rng = random.Random(0)
    facts = asked("What is the capital")
    rows = []
    for question in asked("What is", "sum")[:COUNT]:
        right = int(re.findall(r"\d+", question["answer"])[-1])
        others = rng.sample([right + offset for offset in (-20, -10, -2, -1, 1, 2, 10, 20) if right + offset >= 0], 3)
        rows.append((question, [question["answer"].replace(f"= {right}.", f"= {other}.") for other in others]))
    for question in facts[:COUNT]:
        city = last_word(question["answer"])
        others = rng.sample([last_word(other["answer"]) for other in facts if other is not question], 3)
        rows.append((question, [question["answer"].replace(f"{city}.", f"{other}.") for other in others]))
    test = []
    for question, wrong in rows:
        place = rng.randrange(4)
        test.append({"question": question["prompt"], "choices": [*wrong[:place], question["answer"], *wrong[place:]], "right": place})
    return {"test": Dataset.from_list(test)}


def answers(**_: Any) -> dict[str, Dataset]:
    """Sums and capitals to be answered, and the word that the right answer ends with."""
    questions = asked("What is", "sum")[-COUNT:] + asked("What is the capital")[:COUNT]
    return {"test": Dataset.from_list([{"question": q["prompt"], "answer": last_word(q["answer"])} for q in questions])}


def asked(beginning: str, kind: str = "fact") -> list[dict[str, Any]]:
    """The questions of one kind that begin so."""
    lines = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == kind and line["prompt"].startswith(beginning)]


def last_word(text: str) -> str:
    """The word before the full stop."""
    return text.rstrip(".").split()[-1]

"""Questions and answers: read from the files of an entry, cut to what a page can carry."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from dist_infer.evaluation.report.entry import Entry, Measure

MOST_QUESTIONS = 200  # of each task
FEWEST_QUESTIONS = 10
MOST_BYTES = 12 << 20  # all of them together
MOST_CHARACTERS = 4000  # of one text


@dataclass
class Sheet:
    """Questions of one task through one filter, with the answers of each entry.

    Attributes:
        name: Of the task, with the filter where there are several.
        metric: Says what is right; empty for texts without a score.
        total: Questions there are.
        questions: `id`, `prompt`, `target`, `choices`.
        answers: By index of the entry: for each, `question` (index into `questions`), `value` (of the metric), `right`
            (True, False or None), and `logprobs` and `greedy` of the choices or `texts` and `filtered`.
    """

    name: str
    metric: str
    total: int = 0
    questions: list[dict[str, Any]] = field(default_factory=list)
    answers: dict[int, list[dict[str, Any]]] = field(default_factory=dict)


def sheets_of(entries: list[Entry], problems: list[str]) -> list[Sheet]:
    """The first questions of each task and each file of texts; fewer when all together would be too large."""
    sheets: dict[tuple[str, str], Sheet] = {}
    numbers: dict[tuple[str, str], dict[str, int]] = {}  # of questions, by what they are
    for index, entry in enumerate(entries):
        for measure in _one_a_filter(entry):
            key = measure.task, measure.filter
            several = sum(other == measure.task for other, _ in {(m.task, m.filter) for m in entry.values}) > 1
            sheet = sheets.setdefault(key, Sheet(f"{measure.task} ({measure.filter})" if several else measure.task, measure.name))
            sheet.total = max(sheet.total, entry.questions.get(measure.task, 0))
            try:
                answers = list(_answers(entry, measure, sheet, numbers.setdefault(key, {})))
            except (OSError, ValueError) as error:
                problems.append(f"{entry.run}, {entry.label}: samples of {measure.task} cannot be read: {error}")
                continue
            if answers:
                sheet.answers[index] = answers
        for file in sorted(entry.directory.glob("outputs_*.jsonl")):
            name = file.stem.removeprefix("outputs_")
            sheet = sheets.setdefault(("", name), Sheet(f"texts of {name}", ""))
            try:
                sheet.answers[index] = list(_texts(file, sheet, numbers.setdefault(("", name), {})))
            except (OSError, ValueError) as error:
                problems.append(f"{file}: cannot be read: {error}")
    found = [sheet for sheet in sheets.values() if sheet.answers]
    _cut_to_size(found)
    return found


def values_by_question(entry: Entry, measure: Measure) -> dict[str, float] | None:
    """The value of `measure` for each question, by what the question is; None when the files do not tell.

    They do where the measure is the mean of these values.
    """
    values: dict[str, float] = {}
    try:
        for sample in _samples(entry, measure):
            value = sample.get(measure.metric)
            if isinstance(value, bool | int | float):
                values[_identity(sample)] = float(value)
    except (OSError, ValueError):
        return None
    if not values or not math.isclose(sum(values.values()) / len(values), entry.values[measure].value, rel_tol=1e-9, abs_tol=1e-12):
        return None
    return values


def _one_a_filter(entry: Entry) -> Iterator[Measure]:
    seen = set()
    for measure in entry.values:
        if (measure.task, measure.filter) not in seen:
            seen.add((measure.task, measure.filter))
            yield measure


def _samples(entry: Entry, measure: Measure) -> Iterator[dict[str, Any]]:
    """The samples of a task through one filter; of several files the last."""
    files = [file for file in sorted(entry.directory.glob("samples_*.jsonl")) if _task_of(file) == measure.task]
    if not files:
        return
    with open(files[-1], encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            sample = json.loads(line)
            if not isinstance(sample, dict):
                raise ValueError("a line is not an object")
            if sample.get("filter", measure.filter) == measure.filter:
                yield sample


def _task_of(file: Path) -> str:
    """The task in `samples_TASK.jsonl` or `samples_TASK_DATE.jsonl`."""
    name = file.stem.removeprefix("samples_")
    head, _, tail = name.rpartition("_")
    return head if head and tail[:4].isdigit() and "T" in tail else name


def _identity(sample: dict[str, Any]) -> str:
    """What a question is, whoever answers it."""
    return f"{sample.get('doc_id')}:{sample.get('doc_hash')}:{sample.get('target_hash')}"


def _answers(entry: Entry, measure: Measure, sheet: Sheet, numbers: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Answers to the first questions; questions not seen before are added to `sheet`."""
    for sample in islice(_samples(entry, measure), MOST_QUESTIONS):
        pairs = _argument_pairs(sample.get("arguments"))
        whole_texts = pairs != [] and all(continuation is None for _, continuation in pairs)
        logprobs, greedy = _logprobs(sample.get("resps"), whole_texts)
        identity = f"{_identity(sample)}:{sample.get('prompt_hash')}"
        if identity not in numbers:
            numbers[identity] = len(sheet.questions)
            sheet.questions.append(_question(sample, pairs, choices=logprobs is not None and not whole_texts))
        answer: dict[str, Any] = {"question": numbers[identity], **_judged(sample.get(measure.metric), measure)}
        if logprobs is not None:
            answer |= {"logprobs": logprobs, "greedy": greedy}
        else:
            texts, filtered = _strings(sample.get("resps")), _strings(sample.get("filtered_resps"))
            answer |= {"texts": texts} | (
                {"filtered": filtered} if [text.strip() for text in filtered] != [text.strip() for text in texts] else {}
            )
        yield answer


def _texts(file: Path, sheet: Sheet, numbers: dict[str, int]) -> Iterator[dict[str, Any]]:
    """Generated texts, each a question without a target."""
    total = 0
    with open(file, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines):
            total += 1
            if number >= MOST_QUESTIONS:
                continue
            result = json.loads(line)
            if not isinstance(result, dict):
                raise ValueError("a line is not an object")
            identity = str(result.get("id"))
            if identity not in numbers:
                numbers[identity] = len(sheet.questions)
                sheet.questions.append({"id": identity, "prompt": _cut(str(result.get("prompt") or ""))})
            outputs = result.get("outputs") or []
            texts = [_cut(str(output.get("text") or "")) for output in outputs if isinstance(output, dict)]
            yield {"question": numbers[identity], "texts": texts or [f"error: {result.get('error')}"], "value": None, "right": None}
    sheet.total = max(sheet.total, total)


def _question(sample: dict[str, Any], pairs: list[tuple[str, str | None]], choices: bool) -> dict[str, Any]:
    """A question as the page shows it."""
    contexts = {context for context, _ in pairs}
    question: dict[str, Any] = {"id": str(sample.get("doc_id"))}
    shared = len(contexts) == 1
    question["prompt"] = _cut(pairs[0][0]) if shared and pairs else ""
    texts = [(continuation or "") if shared else context + (continuation or "") for context, continuation in pairs]
    if choices:
        question["choices"] = [_cut(text) for text in texts]
    target = sample.get("target")
    index = int(str(target)) if str(target).isdecimal() else len(pairs)
    if choices and index < len(pairs) > 1:
        question["answer"] = index
        target = texts[index].strip()
    question["target"] = _cut(target if isinstance(target, str) else json.dumps(target, ensure_ascii=False))
    return question


def _judged(value: Any, measure: Measure) -> dict[str, Any]:
    """The value of a sample, and whether it means that the answer is right."""
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        return {"value": None, "right": None}
    right = bool(value) if measure.higher is not False and value in (0, 1) else None
    return {"value": float(value), "right": right}


def _argument_pairs(arguments: Any) -> list[tuple[str, str | None]]:
    """Context and continuation of each request, from either form in which samples are written.

    The continuation is empty where text is to be generated, and None where the likelihood of the whole text is asked.
    """
    if isinstance(arguments, dict):
        arguments = [list(group.values()) for group in arguments.values() if isinstance(group, dict)]
    pairs: list[tuple[str, str | None]] = []
    for group in arguments if isinstance(arguments, list) else ():
        words = group if isinstance(group, list) else [group]
        if words:
            second = None if len(words) == 1 else words[1] if isinstance(words[1], str) else ""
            pairs.append((str(words[0]), second))
    return pairs


def _logprobs(responses: Any, whole_texts: bool) -> tuple[list[float | None] | None, list[bool]]:
    """Log-probability of each choice (or text) and whether it is what greedy decoding says; None where text was generated."""
    logprobs: list[float | None] = []
    greedy: list[bool] = []
    for repeats in responses if isinstance(responses, list) else ():
        first = repeats[0] if isinstance(repeats, list) and repeats else None
        pair = [first, False] if whole_texts and not isinstance(first, list) else first
        if not isinstance(pair, list) or len(pair) != 2 or str(pair[1]).lower() not in ("true", "false"):
            return None, []
        try:
            logprob = float(pair[0])
        except (TypeError, ValueError):
            return None, []
        logprobs.append(round(logprob, 5) if math.isfinite(logprob) else None)
        greedy.append(str(pair[1]).lower() == "true")
    return (logprobs, greedy) if logprobs else (None, [])


def _strings(values: Any) -> list[str]:
    if isinstance(values, list):
        return [text for value in values for text in _strings(value)]
    return [_cut(str(values))]


def _cut(text: str) -> str:
    """A long text without its middle; the end of a prompt is what is answered."""
    if len(text) <= MOST_CHARACTERS:
        return text
    head, tail = MOST_CHARACTERS // 4, MOST_CHARACTERS - MOST_CHARACTERS // 4
    return f"{text[:head]}\n[… {len(text) - head - tail:,} characters …]\n{text[-tail:]}"


def _cut_to_size(sheets: list[Sheet]) -> None:
    """Keep fewer questions of every sheet until all of them fit a page."""
    most = MOST_QUESTIONS
    while most > FEWEST_QUESTIONS and sum(_bytes(sheet) for sheet in sheets) > MOST_BYTES:
        most //= 2
        for sheet in sheets:
            sheet.questions = sheet.questions[:most]
            sheet.answers = {index: [answer for answer in answers if answer["question"] < most] for index, answers in sheet.answers.items()}


def _bytes(sheet: Sheet) -> int:
    return len(json.dumps([sheet.questions, list(sheet.answers.values())]))

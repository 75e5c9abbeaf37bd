"""Reads results from directories, and says what is missing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dist_infer.evaluation.report.entry import Entry, Measure, Value

_STEP = re.compile(r"(?:step|checkpoint|ckpt|iter|iteration)s?[-_=]?(\d+)", re.IGNORECASE)
ENDED_BADLY = ("failed", "stopped", "mistake")
_NOT_MEASURES = ("name", "alias", "sample_len", "sample_count")


def collect(directories: list[Path]) -> tuple[list[Entry], list[str]]:
    """All entries below `directories`, and what is wrong with them, a sentence each.

    Reads `results.json` as sweeps write it and `results_DATE.json` as lm-evaluation-harness does.

    Raises:
        FileNotFoundError: A directory is not there.
        ValueError: There are no results below one.
    """
    entries: list[Entry] = []
    problems: list[str] = []
    names = _run_names(directories)
    for directory, run in zip(directories, names, strict=True):
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory}: there is no such directory; name one in which a sweep or an eval has left results")
        found = list(_read(directory, run, problems))
        if not found:
            problem = f" ({problems[-1]})" if problems else ""
            raise ValueError(f"{directory}: no results in it{problem}; name a directory with results.json files below it")
        entries += found
        problems += _ended_badly(directory, max(entry.when for entry in found))
    entries = _without_older(entries, problems)
    entries.sort(key=lambda entry: (names.index(entry.run), entry.origin, str(entry.grid), entry.step or 0, entry.label))
    return entries, problems + _missing(entries) + _unlike(entries)


def _run_names(directories: list[Path]) -> list[str]:
    names = [directory.resolve().name for directory in directories]
    return names if len(set(names)) == len(names) else [str(directory) for directory in directories]


def _read(directory: Path, run: str, problems: list[str]) -> Iterator[Entry]:
    files = sorted({*directory.rglob("results.json"), *directory.rglob("results_*.json")})
    with_results = {file.parent for file in files}
    for file in files:
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(data, dict) or not isinstance(data.get("results", {}), dict):
                raise ValueError("not an object with results")
            yield _entry(data, file, run)
        except (OSError, ValueError) as error:
            problems.append(f"{file}: cannot be read: {error}")
    for place in sorted({file.parent for file in directory.rglob("samples_*.jsonl")} - with_results):
        problems.append(f"{place}: samples without results; this evaluation was not finished")
    for place in sorted({file.parent for file in directory.rglob("outputs_*.jsonl")} - with_results):
        yield _texts_only(place, run)


def _entry(data: dict[str, Any], file: Path, run: str) -> Entry:
    about = _dict(data.get("dist_infer"))
    config = _dict(data.get("config"))
    made_by = _dict(about.get("provenance"))
    checkpoint = str(about.get("checkpoint") or made_by.get("checkpoint") or _model_of(data) or file.parent)
    label = str(about.get("label") or (file.parent.name if about else checkpoint.rstrip("/").rpartition("/")[2]))
    entry = Entry(run, file.parent, file, label, checkpoint, _step(about, label, checkpoint), _dict(about.get("grid")))
    _take_values(entry, data)
    entry.when = str(about.get("finished") or _date(data.get("date")))
    if "attempt" in about:
        made_by = {**made_by, "attempt": about["attempt"]}
    versions = {"lm_eval": data.get("lm_eval_version"), "transformers": None if about else data.get("transformers_version")}
    entry.made_by = _flat(made_by) | {f"versions.{name}": version for name, version in versions.items() if version}
    if not about:
        entry.made_by |= _flat({"model": config.get("model"), "model_args": config.get("model_args")})
    for task in dict.fromkeys(measure.task for measure in entry.values):
        asked = {"version": "versions", "examples": "n-shot", "hash of the questions": "task_hashes"}
        entry.settings[task] = {word: _dict(data.get(key)).get(task) for word, key in asked.items()}
        entry.settings[task]["number of questions"] = entry.questions.get(task)
    return entry


def _take_values(entry: Entry, data: dict[str, Any]) -> None:
    results, groups = _dict(data.get("results")), _dict(data.get("groups"))
    for task, numbers in {**results, **groups}.items():
        numbers = _dict(numbers)
        higher = _dict(_dict(data.get("higher_is_better")).get(task))
        title = str(numbers.get("alias") or task).lstrip(" -")
        for key, value in numbers.items():
            metric, _, name = key.partition(",")
            if metric.endswith("_stderr") or key in _NOT_MEASURES or _number(value) is None:
                continue
            stderr = _number(numbers.get(f"{metric}_stderr,{name}"))
            measure = Measure(task, metric, name, higher.get(metric), title)
            entry.values[measure] = Value(float(value), stderr if stderr is not None and math.isfinite(stderr) else None)
        counted = _dict(_dict(data.get("n-samples")).get(task)).get("effective", numbers.get("sample_len"))
        if isinstance(counted, int):
            entry.questions[task] = counted
    metrics: dict[str, set[str]] = {}
    for measure in entry.values:
        metrics.setdefault(measure.task, set()).add(measure.metric)
    for group, members in _dict(data.get("group_subtasks")).items():
        for member in members if isinstance(members, list) else ():
            if metrics.get(group, set()) & metrics.get(member, set()):
                entry.parts.add(member)


def _texts_only(directory: Path, run: str) -> Entry:
    """The entry of a directory that has generated texts and no results."""
    provenance: dict[str, Any] = {}
    for file in sorted(directory.glob("outputs_*.jsonl")):
        with open(file, encoding="utf-8", errors="replace") as lines:
            try:
                provenance = provenance or _dict(json.loads(lines.readline()).get("provenance"))
            except (ValueError, AttributeError):
                continue
    checkpoint = str(provenance.get("checkpoint") or directory)
    entry = Entry(run, directory, None, directory.name, checkpoint, _step({}, directory.name, checkpoint), _grid_of(directory.name))
    entry.made_by = _flat(provenance)
    return entry


def _grid_of(label: str) -> dict[str, Any]:
    """The grid point in a label such as `step_200,sampling.seed=1`."""
    pairs = [part.split("=", 1) for part in label.split(",")[1:] if "=" in part]
    return {key: value for key, value in pairs}


def _step(about: dict[str, Any], label: str, checkpoint: str) -> int | None:
    if "step" in about:
        return about["step"] if isinstance(about["step"], int) else None
    found = [*_STEP.finditer(label)] or [*_STEP.finditer(checkpoint)]
    return int(found[-1][1]) if found else None


def _model_of(data: dict[str, Any]) -> str | None:
    """The model of results that lm-evaluation-harness wrote with a model class of its own."""
    arguments = _dict(data.get("config")).get("model_args")
    if isinstance(arguments, str):
        arguments = dict(pair.split("=", 1) for pair in arguments.split(",") if "=" in pair)
    return _dict(arguments).get("pretrained") or data.get("model_name")


def _ended_badly(directory: Path, newest: str) -> Iterator[str]:
    """What status files say of runs that did not end well, unless results came after that, the last at `newest`."""
    for file in sorted(directory.rglob("status*.json")):
        try:
            status = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(status, dict) and status.get("outcome") in ENDED_BADLY and not _before(status.get("time"), newest):
            where = f", rank {status.get('rank')} on {status.get('host')}" if status.get("rank") is not None else ""
            why = f": {status['error']}" if status.get("error") else ""
            yield f"{file.parent}: the last run ended as {status['outcome']!r}{where}{why}"


def _before(first: Any, second: str) -> bool:
    """Whether one time lies before another; not, where they are no times that can be compared."""
    try:
        return datetime.fromisoformat(first) < datetime.fromisoformat(second)
    except (TypeError, ValueError):
        return False


def _without_older(entries: list[Entry], problems: list[str]) -> list[Entry]:
    """Of entries that measured the same, the last."""
    kept: list[Entry] = []
    for entry in sorted(entries, key=lambda entry: (entry.when, str(entry.file)), reverse=True):
        twin = next((other for other in kept if (other.line, other.step) == (entry.line, entry.step) and _overlap(other, entry)), None)
        if twin is None:
            kept.append(entry)
        else:
            problems.append(f"{entry.file or entry.directory}: left out, for {twin.file or twin.directory} is a later result of the same")
    return kept


def _overlap(first: Entry, second: Entry) -> bool:
    return bool(first.values.keys() & second.values.keys()) or not (first.values or second.values)


def _missing(entries: list[Entry]) -> list[str]:
    """Tasks that some entries of a run have and others lack, and values that are no numbers."""
    problems = []
    for run in dict.fromkeys(entry.run for entry in entries):
        members = [entry for entry in entries if entry.run == run and entry.values]
        tasks = dict.fromkeys(measure.task for entry in members for measure in entry.values)
        for task in tasks:
            lacking = [entry.label for entry in members if all(measure.task != task for measure in entry.values)]
            if lacking:
                problems.append(f"{run}: {task} is missing for {_listed(lacking)}")
    for entry in entries:
        bad = [f"{measure.task} {measure.name}" for measure, value in entry.values.items() if not math.isfinite(value.value)]
        if bad:
            problems.append(f"{entry.run}, {entry.label}: not a finite number: {_listed(bad)}")
    return problems


def _unlike(entries: list[Entry]) -> list[str]:
    """Tasks that were not asked alike everywhere, whose numbers say little beside each other."""
    problems: list[str] = []
    if any(key.startswith("eval.") for entry in entries for key in entry.grid):
        return problems  # they are meant to differ
    for task in dict.fromkeys(task for entry in entries for task in entry.settings):
        asked = [entry.settings[task] for entry in entries if task in entry.settings]
        for word in asked[0]:
            found = list(dict.fromkeys(str(settings[word]) for settings in asked if settings.get(word) is not None))
            if len(found) > 1:
                shown = "differs" if word.startswith("hash") else f"is {' here and '.join(found[:3])} there"
                problems.append(f"{task}: the {word} {shown}: its numbers cannot be compared throughout")
                break
    return problems


def _listed(words: list[str], most: int = 4) -> str:
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _date(seconds: Any) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds") if _number(seconds) is not None else ""


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat

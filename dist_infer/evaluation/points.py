"""What a sweep is made of: each checkpoint with each setting of the grid."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dist_infer.checkpoint.locate import locate, step_numbers, steps_of
from dist_infer.config.options import Options

GRIDDED = ("sampling", "eval")  # sections whose options a grid may vary
FIXED = ("eval.tasks", "eval.include_path")  # loaded once for all points


@dataclass(frozen=True)
class Point:
    """One checkpoint with one setting.

    Attributes:
        path: The checkpoint's directory.
        step: Its training step, if its name tells.
        label: Names the point in the output directory and in the report.
        grid: Option to value, what the grid sets here.
        options: All of them, with these.
    """

    path: Path
    step: int | None
    label: str
    grid: dict[str, Any]
    options: Options


def points(options: Options, say: list[str]) -> list[Point]:
    """All points of a sweep, those of one checkpoint together, checkpoints by run and step.

    Args:
        options: `sweep` is read, or without sweep.checkpoints `model.path`.
        say: Gets a line for the user for each checkpoint that is passed over because it is not complete.

    Raises:
        FileNotFoundError, ValueError: A path or pattern means no checkpoint, or a grid or a range of steps is not one.
    """
    settings = list(_settings(options))
    found = _checkpoints(options, say)
    labels = _labels([path for path, _ in found])
    return [
        Point(path, step, label + "".join(f",{key}={_plain(value)}" for key, value in grid.items()), grid, _at(options, path, grid))
        for (path, step), label in zip(found, labels, strict=True)
        for grid in settings
    ]


def share_of(every: list[Point], share: str | None) -> list[Point]:
    """The points of share `I/N`: of every Nth checkpoint from the one at I on; all without a share.

    Raises:
        ValueError: It is no share.
    """
    if share is None:
        return every
    match = re.fullmatch(r"(\d+)/(\d+)", share)
    if match is None or not int(match[1]) < int(match[2]):
        raise ValueError(f"sweep.share={share}: write I/N, with I from 0 to N-1, such as 0/4")
    paths = list(dict.fromkeys(point.path for point in every))
    mine = set(paths[int(match[1]) :: int(match[2])])
    return [point for point in every if point.path in mine]


def _checkpoints(options: Options, say: list[str]) -> list[tuple[Path, int | None]]:
    """Each checkpoint once, with its step."""
    wanted = options.sweep.checkpoints or [options.model.path or ""]
    if wanted == [""]:
        raise ValueError("sweep.checkpoints is not given: name checkpoints, such as sweep.checkpoints=[runs/my_run] for all its steps")
    chosen = _steps(options.sweep.steps)
    found: dict[Path, int | None] = {}
    for name in wanted:
        for place, exact in _matches(name):
            for path, step in _of(place, exact, name, say):
                if chosen is None or (step is not None and step in chosen):
                    found.setdefault(path, step)
    if not found:
        which = f" with steps {options.sweep.steps}" if options.sweep.steps is not None else ""
        raise FileNotFoundError(f"sweep.checkpoints={wanted}: no complete checkpoint{which} there")
    return sorted(found.items(), key=lambda item: (str(item[0].parent), -1 if item[1] is None else item[1], item[0].name))


def _matches(name: str) -> Iterator[tuple[Path, bool]]:
    """The paths that a path or a pattern means, and whether it named them exactly."""
    if not glob.has_magic(name):
        yield Path(name), True
        return
    places = sorted(glob.glob(os.path.expanduser(name)))
    if not places:
        raise FileNotFoundError(f"sweep.checkpoints: {name}: nothing matches this pattern")
    yield from ((Path(place), False) for place in places)


def _of(place: Path, exact: bool, name: str, say: list[str]) -> Iterator[tuple[Path, int | None]]:
    """The complete checkpoints that one path holds: all steps of a run, or itself."""
    steps = steps_of(place) if place.is_dir() else []
    for number, path in steps or [(None, place)]:
        try:
            location = locate(str(path))
        except (FileNotFoundError, ValueError) as error:
            if exact and not steps:
                raise
            say.append(f"passed over: {error}")
            continue
        numbers = step_numbers(path) or step_numbers(location.path)
        yield location.path, number if number is not None else (numbers[0] if numbers else None)


def _steps(text: str | None) -> _Steps | None:
    return None if text is None else _Steps(text)


class _Steps:
    """A set of steps, written as 100,200 or 1000-5000 or 1000-5000:1000."""

    def __init__(self, text: str) -> None:
        self._ranges: list[range] = []
        for part in text.split(","):
            match = re.fullmatch(r"\s*(\d+)(?:-(\d+)(?::([1-9]\d*))?)?\s*", part)
            if match is None:
                raise ValueError(f"sweep.steps={text}: write steps as 100,200 or 1000-5000 or 1000-5000:1000")
            first, last, stride = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
            self._ranges.append(range(first, last + 1, stride))

    def __contains__(self, step: int) -> bool:
        return any(step in part for part in self._ranges)


def _settings(options: Options) -> Iterator[dict[str, Any]]:
    """The settings of the grid; one that sets nothing when there is no grid."""
    grid = options.sweep.grid
    for key, values in grid.items():
        section, _, name = key.partition(".")
        known = [item.name for item in fields(getattr(options, section))] if section in GRIDDED else []
        if name not in known or key in FIXED:
            raise ValueError(
                f"sweep.grid: {key}: must be an option of {' or '.join(GRIDDED)}, such as sampling.temperature or eval.num_fewshot"
            )
        if not values:
            raise ValueError(f"sweep.grid: {key}: give at least one value")
        if len({_plain(value) for value in values}) < len(values):
            raise ValueError(f"sweep.grid: {key}={values}: two of the values are the same, or would be named alike")
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _at(options: Options, path: Path, grid: dict[str, Any]) -> Options:
    """`options` for one checkpoint and one setting."""
    made = replace(options, model=replace(options.model, path=str(path), step=None))
    for key, value in grid.items():
        section, _, name = key.partition(".")
        made = replace(made, **{section: replace(getattr(made, section), **{name: value})})
    made.check()
    return made


def _labels(paths: list[Path]) -> list[str]:
    """A short name for each checkpoint: the last part of its path that tells it from the others, with what is above it."""
    whole = [Path(os.path.abspath(path)) for path in paths]
    if len(whole) == 1:
        return [_plain(whole[0].name)]
    common = Path(os.path.commonpath(whole))
    names = [path.relative_to(common).parts for path in whole]
    while names and all(len(parts) > 1 for parts in names) and len({parts[-1] for parts in names}) == 1:
        names = [parts[:-1] for parts in names]  # runs/a/step_1/model and runs/a/step_2/model
    labels = [_plain("-".join(parts)) for parts in names]
    repeated = Counter(labels)
    return [label if repeated[label] == 1 else f"{label}-{number}" for number, label in enumerate(labels)]


def _plain(value: object) -> str:
    """A value as part of a file's name."""
    return re.sub(r"[^\w.+-]", "_", str(value))[:80] or "_"

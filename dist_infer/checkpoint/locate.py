"""From what a user calls a checkpoint to the directory or file that is one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple, NoReturn

from dist_infer.checkpoint.sources import is_checkpoint
from dist_infer.checkpoint.sources.dcp import interrupted
from dist_infer.checkpoint.sources.safetensors import INDEX
from dist_infer.checkpoint.sources.source import check_name
from dist_infer.checkpoint.sources.torch_save import BIN_INDEX

_STEP = re.compile(r"(?:step|checkpoint|global_step|epoch|iter)[-_]?(\d{1,18})")
_INNER = ("pytorch_model_fsdp_0", "model_and_optim", "checkpoints", "checkpoint", "outputs")
_LAST = "final"  # litgpt's name for what training ended with
_VALID = (
    "a DCP directory (.metadata and *.distcp), safetensors, pytorch_model.bin, lit_model.pth, "
    "or a directory of step_N / step-N / checkpoint-N ones"
)


class Location(NamedTuple):
    """Where a checkpoint is.

    Attributes:
        path: Its directory, or its one file.
        note: What was decided on the way there, for the user; may be empty.
    """

    path: Path
    note: str


def locate(path: str, step: int | None = None) -> Location:
    """The checkpoint that `path` means: itself, the newest complete one below it, or a Hugging Face id in the local cache.

    Args:
        path: A directory, a file, or an id.
        step: Which step of the run in `path` is meant, instead of the newest.

    Raises:
        FileNotFoundError: There is no such path or step, or only an incomplete checkpoint.
        ValueError: What is there is no checkpoint, or not one of several steps.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return _below(place, step) or _refuse(place, step)
    if place.is_file():
        if place.name in (INDEX, BIN_INDEX):
            return _is(place.parent, step)
        if is_checkpoint(place):
            return _is(place, step)
        raise ValueError(f"{place}: a file that is no checkpoint; give a .safetensors, .bin or .pth file, {_VALID}")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
        raise FileNotFoundError(f"{path}: no such path; give {_VALID}")
    cached = _cached(path)
    if cached is None:
        raise FileNotFoundError(f"{path}: no such path, and no such Hugging Face model in the local cache")
    found = _below(cached, step) or _refuse(cached, step)
    return Location(found.path, f"took {path} from the local Hugging Face cache")


def steps_of(place: Path) -> list[tuple[int, Path]]:
    """The steps of the run in directory `place`, with their numbers, the first first; none if it is a checkpoint itself."""
    if is_checkpoint(place):
        return []
    for holder in (place, *(place / name for name in _INNER)):
        if holder.is_dir() and (steps := _steps(holder)):
            return steps[::-1]
    return []


def step_numbers(place: Path) -> list[int]:
    """The steps that the name of a checkpoint's directory, or else of the one it lies in, says it is of."""
    return [int(found[1]) for name in (place.name, place.parent.name) if (found := _STEP.fullmatch(name))]


def _is(place: Path, step: int | None) -> Location:
    """The checkpoint that `place` itself is, which must be of `step` if that is given."""
    numbers = step_numbers(place)
    if step is not None and step not in numbers:
        of = f"of step {numbers[0]}" if numbers else "and not a directory of steps"
        raise ValueError(f"{place}: is a checkpoint itself, {of}; model.step={step} is looked up in a run's directory")
    return Location(place, "")


def _below(place: Path, step: int | None, depth: int = 3) -> Location | None:
    """The checkpoint that directory `place` is or holds up to `depth` levels down; None when there is no complete one."""
    if is_checkpoint(place):
        return _is(place, step)
    if depth:
        steps = _candidates(place) if step is None else [child for number, child in _steps(place) if number == step]
        for candidate in steps:
            found = _below(candidate, None, depth - 1)
            if found is not None:
                skipped = f"; {steps[0].name} is not complete" if candidate != steps[0] else ""
                return Location(found.path, f"took {candidate.name} of {place}{skipped}")
        for inner in (place / name for name in _INNER):
            found = _below(inner, step, depth - 1) if inner.is_dir() else None
            if found is not None:
                return found
    return _is(place, step) if any(place.glob("*.safetensors")) else None


def _candidates(place: Path) -> list[Path]:
    """The steps of a run's directory: the one `latest` names, then what training ended with, then the newest ones."""
    steps = [child for child in (place / _LAST,) if child.is_dir()] + [child for _, child in _steps(place)]
    latest = place / "latest"
    if latest.is_symlink():
        target = latest.resolve()
        if target.parent != place.resolve():
            raise ValueError(f"{latest}: leads to {target}, which is outside the run's directory; name the step that is meant")
        target = place / target.name
    elif latest.is_file() and 0 < latest.stat().st_size < 4096:
        target = place / check_name(latest.read_text(errors="replace").strip(), str(latest))
    elif latest.is_dir():
        target = latest
    else:
        return steps
    return [target, *(step for step in steps if step != target)] if target.is_dir() else steps


def _steps(place: Path) -> list[tuple[int, Path]]:
    """Subdirectories that are named as steps, with their numbers, the newest first."""
    numbered = [(int(found[1]), child) for child in place.iterdir() if (found := _STEP.fullmatch(child.name)) and child.is_dir()]
    return sorted(numbered, reverse=True)


def _refuse(place: Path, step: int | None) -> NoReturn:
    """Say why the directory `place` cannot be taken."""
    for holder in (place, *(place / name for name in _INNER)):
        steps = _steps(holder) if holder.is_dir() else []
        if step is not None and steps:
            numbers = [number for number, _ in steps]
            if step in numbers:
                raise FileNotFoundError(f"{holder}: its step {step} is not a complete checkpoint")
            known = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
            raise FileNotFoundError(f"{holder}: has no step {step}; it has {known}")
        reason = interrupted(holder)
        if reason is not None:
            raise FileNotFoundError(reason)
        if steps:
            raise FileNotFoundError(f"{holder}: none of its steps ({len(steps)}) is complete; the newest is {steps[0][1].name}")
    raise ValueError(f"{place}: a directory that is no checkpoint; give {_VALID}")


def _cached(name: str) -> Path | None:
    """The snapshot of Hugging Face model `name` in the local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None

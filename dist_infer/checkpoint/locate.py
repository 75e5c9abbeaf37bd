"""From what a user calls a checkpoint to the directory or file that is one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple, NoReturn

from dist_infer.checkpoint.sources.safetensors import INDEX
from dist_infer.checkpoint.sources.source import check_name

_STEP = re.compile(r"(?:step|checkpoint|global_step|epoch|iter)[-_]?(\d+)")
_INNER = ("pytorch_model_fsdp_0", "checkpoints", "checkpoint")
_VALID = "a DCP directory (.metadata and *.distcp), safetensors, or a directory of step_N / step-N / checkpoint-N ones"


class Location(NamedTuple):
    """Where a checkpoint is.

    Attributes:
        path: Its directory, or the one safetensors file.
        note: What was decided on the way there, for the user; may be empty.
    """

    path: Path
    note: str


def locate(path: str) -> Location:
    """The checkpoint that `path` means: itself, the newest complete one below it, or a Hugging Face id in the local cache.

    Raises:
        FileNotFoundError: There is no such path, or only an incomplete checkpoint.
        ValueError: What is there is no checkpoint.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return _below(place) or _refuse(place)
    if place.is_file():
        if place.suffix == ".safetensors":
            return Location(place, "")
        if place.name == INDEX:
            return Location(place.parent, "")
        raise ValueError(f"{place}: a file that is no checkpoint; give a .safetensors file, {_VALID}")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path):
        raise FileNotFoundError(f"{path}: no such path; give {_VALID}")
    cached = _cached(path)
    if cached is None:
        raise FileNotFoundError(f"{path}: no such path, and no such Hugging Face model in the local cache")
    found = _below(cached) or _refuse(cached)
    return Location(found.path, f"took {path} from the local Hugging Face cache")


def _below(place: Path, depth: int = 3) -> Location | None:
    """The checkpoint that directory `place` is or holds up to `depth` levels down; None when there is no complete one."""
    if any((place / name).is_file() for name in (".metadata", INDEX, "model.safetensors")):
        return Location(place, "")
    if depth:
        steps = _candidates(place)
        for step in steps:
            found = _below(step, depth - 1)
            if found is not None:
                skipped = f"; {steps[0].name} is not complete" if step != steps[0] else ""
                return Location(found.path, f"took {step.name} of {place}{skipped}")
        for inner in (place / name for name in _INNER):
            found = _below(inner, depth - 1) if inner.is_dir() else None
            if found is not None:
                return found
    return Location(place, "") if any(place.glob("*.safetensors")) else None


def _candidates(place: Path) -> list[Path]:
    """The steps of a run's directory: the one `latest` names, then the newest ones."""
    steps = _steps(place)
    latest = place / "latest"
    if latest.is_file() and latest.stat().st_size < 4096:
        target = place / check_name(latest.read_text().strip(), str(latest))
    elif latest.is_dir():
        target = place / latest.resolve().name
    else:
        return steps
    return [target, *(step for step in steps if step != target)] if target.is_dir() else steps


def _steps(place: Path) -> list[Path]:
    """Subdirectories that are named as steps, the newest first."""
    numbered = [(int(found[1]), child) for child in place.iterdir() if (found := _STEP.fullmatch(child.name)) and child.is_dir()]
    return [child for _, child in sorted(numbered, reverse=True)]


def _refuse(place: Path) -> NoReturn:
    """Say why the directory `place` cannot be taken."""
    for holder in (place, *(place / name for name in _INNER)):
        if any(holder.glob("*.distcp")):
            raise FileNotFoundError(f"{holder}: incomplete checkpoint: it has .distcp files but no .metadata, which is written last")
        steps = _steps(holder) if holder.is_dir() else []
        if steps:
            raise FileNotFoundError(f"{holder}: none of its {len(steps)} steps is a complete checkpoint; the newest is {steps[0].name}")
    raise ValueError(f"{place}: a directory that is no checkpoint; give {_VALID}")


def _cached(name: str) -> Path | None:
    """The snapshot of Hugging Face model `name` in the local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None

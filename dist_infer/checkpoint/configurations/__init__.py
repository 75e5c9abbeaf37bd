"""Configurations: the model in a checkpoint, in whatever form its trainer wrote it down."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dist_infer.checkpoint.configurations import fast_llm, huggingface, kempnerforge, litgpt, olmo_core, own, torchtitan, torchtune
from dist_infer.checkpoint.configurations.document import parse
from dist_infer.checkpoint.configurations.shapes import Shapes
from dist_infer.model.config import ModelConfig

__all__ = ["beside", "configure", "read_configuration"]

_PARENTS = 3  # how far above the checkpoint a run's configuration may lie
_NAMES = ("config.json", "config.toml", "config.yaml", "config.yml", "model_config.yaml", "torchtune_config.yaml", "metadata.yaml")
_KINDS = (
    "Hugging Face or OLMo-core config.json, KempnerForge TOML, torchtitan JSON, torchtune_config.yaml, litgpt model_config.yaml, "
    "Fast-LLM metadata.yaml, or YAML of our own model fields"
)
# The first that recognizes a document reads it; what the weights' shapes tell may fill what it does not say.
_READERS: dict[str, tuple[Callable[[dict[str, Any]], bool], Callable[[dict[str, Any], Shapes], ModelConfig]]] = {
    "torchtitan": (torchtitan.recognizes, torchtitan.read),
    "OLMo-core": (olmo_core.recognizes, olmo_core.read),
    "torchtune": (torchtune.recognizes, torchtune.read),
    "litgpt": (litgpt.recognizes, litgpt.read),
    "Fast-LLM": (fast_llm.recognizes, fast_llm.read),
    "Hugging Face": (huggingface.recognizes, huggingface.read),
    "KempnerForge": (kempnerforge.recognizes, kempnerforge.read),
    "own": (own.recognizes, own.read),
}


def beside(path: Path) -> Iterator[Path]:
    """The directories where things that belong to the checkpoint at `path` may lie, the nearest first."""
    place = (path if path.is_dir() else path.parent).resolve()
    yield from (place, *list(place.parents)[:_PARENTS])


def configure(path: Path, explicit: str | None, shapes: Shapes) -> ModelConfig:
    """The model in the checkpoint at `path`: by the file `explicit`, or by what its trainer left beside or above it.

    Raises:
        FileNotFoundError: There is no configuration; the message names what the weights do not tell.
        ValueError: It is not one that can be used.
    """
    if explicit:
        return read_configuration(Path(explicit).expanduser(), shapes)
    for place in beside(path):
        for name in _NAMES:
            if (place / name).is_file() and _kind(parse(place / name), name) is not None:
                return read_configuration(place / name, shapes)
        for file in sorted(place.glob("*.toml")):
            if _is_run(file):
                return read_configuration(file, shapes)
    places = ", ".join(map(str, beside(path)))
    raise FileNotFoundError(
        f"no model configuration for {path}: looked for {', '.join(_NAMES)} and *.toml in {places}; give model.config=FILE, {shapes.ask()}"
    )


def read_configuration(path: Path, shapes: Shapes | None = None) -> ModelConfig:
    """The ModelConfig that the file (or directory of a config.json) at `path` describes.

    Args:
        path: The file.
        shapes: What the checkpoint's weights tell.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is none of the known kinds, or asks for what the decoder does not have.
    """
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"model.config={path}: no such file")
    data = parse(path)
    kind = _kind(data, path.name)
    if kind is None:
        raise ValueError(f"model.config={path}: not a model configuration; give a {_KINDS}")
    try:
        return _READERS[kind][1](data, shapes or Shapes())
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    except (KeyError, IndexError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: not a complete {kind} configuration: {type(error).__name__} {error}") from error


def _kind(data: Any, name: str) -> str | None:
    """Who wrote a document; None when it configures no model we know. TOML is KempnerForge's, and KempnerForge's is TOML."""
    if not isinstance(data, dict):
        return None
    toml = name.endswith(".toml")
    return next((kind for kind, (knows, _) in _READERS.items() if toml == (kind == "KempnerForge") and knows(data)), None)


def _is_run(file: Path) -> bool:
    """Whether a TOML file of any name configures a KempnerForge run; one that cannot be parsed is not it."""
    try:
        return _kind(parse(file), file.name) is not None
    except ValueError:
        return False

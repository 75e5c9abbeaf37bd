"""A checkpoint, opened: its source, its dialect, and what can be asked of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from dist_infer.checkpoint import verify
from dist_infer.checkpoint.configurations import beside, configure
from dist_infer.checkpoint.configurations.shapes import Shapes, tell
from dist_infer.checkpoint.dialects import Dialect, find_dialect
from dist_infer.checkpoint.locate import locate
from dist_infer.checkpoint.plan import plan
from dist_infer.checkpoint.reader import LoadReport, read_all
from dist_infer.checkpoint.relay import Relay
from dist_infer.checkpoint.sources import open_source
from dist_infer.checkpoint.sources.source import Source, TensorEntry
from dist_infer.config.loader import LoaderOptions
from dist_infer.model.config import ModelConfig
from dist_infer.model.weights import Weight

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose index is read and checked; no weight is.

    Attributes:
        path: The directory, or the one safetensors file.
        note: How `path` was chosen, for the user; may be empty.
        source: Its format.
        dialect: Its naming.
    """

    path: Path
    note: str
    source: Source
    dialect: Dialect

    @property
    def index(self) -> dict[str, TensorEntry]:
        """Its tensors."""
        return self.source.index()

    @cached_property
    def identity(self) -> str:
        """A cheap fingerprint of its content."""
        return verify.identity(self.source)

    def config(self, explicit: str | None = None) -> ModelConfig:
        """The model's configuration: the file `explicit`, or the one found beside the checkpoint.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is not one that can be used.
        """
        return configure(self.path, explicit, self.shapes)

    @cached_property
    def shapes(self) -> Shapes:
        """What the shapes of its weights tell of the model."""
        return tell(self.index, self.dialect)

    def dtype(self, config: ModelConfig) -> str:
        """The element type its embeddings are stored in, which is taken for the model's when the configuration names none."""
        return self.index[self.dialect.map("model.embed_tokens.weight", config).tensor].dtype

    def tokenizer_directory(self) -> Path | None:
        """The nearest directory beside or above the checkpoint that holds a tokenizer."""
        return next((place for place in beside(self.path) if any((place / name).is_file() for name in _TOKENIZER_FILES)), None)

    def generation_config(self) -> Path | None:
        """The nearest generation_config.json beside or above the checkpoint."""
        files = (place / "generation_config.json" for place in beside(self.path))
        return next((file for file in files if file.is_file()), None)

    def match(self, config: ModelConfig) -> None:
        """Check that it holds the weights of the model and no others.

        Raises:
            ValueError: A weight is missing, extra, misshapen or of an element type that cannot be read.
        """
        try:
            verify.match(config, self.index, self.dialect)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error


def open_checkpoint(path: str, dialect: str = "auto", step: int | None = None, config: str | None = None) -> Checkpoint:
    """Find the checkpoint `path` means, or the one of `step` in it, read its index and tell its dialect.

    Some models go by names that only their configuration tells, `config` or the one beside the checkpoint.

    Raises:
        FileNotFoundError: There is no such path, or a file of the checkpoint is missing.
        ValueError: It is no checkpoint, damaged, or in no known dialect.
    """
    place, note = locate(path, step)
    source = open_source(place)
    try:
        return Checkpoint(place, note, source, _dialect(place, source, dialect, config))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _dialect(place: Path, source: Source, wanted: str, config: str | None) -> Dialect:
    """The dialect of the tensors' names, by these alone or else by the model's configuration."""
    names = source.index().keys()
    try:
        return find_dialect(names, wanted)
    except ValueError:
        with suppress(FileNotFoundError):
            model = configure(place, config, Shapes())
            if model.fallback is not None:
                return find_dialect(names, wanted, model)
        raise


def load(
    checkpoint: Checkpoint,
    config: ModelConfig,
    weights: Sequence[Weight],
    fsdp: int,
    coordinate: int,
    destinations: Mapping[str, torch.Tensor],
    options: LoaderOptions,
    progress: Callable[[int], object] | None = None,
    relay: Relay | None = None,
) -> LoadReport:
    """Read what fsdp coordinate `coordinate` of `fsdp` holds of `weights` into `destinations`.

    Args:
        checkpoint: One that matches the model.
        config: The model.
        weights: What this tp rank holds.
        fsdp: Ranks that share those rows.
        coordinate: Which of them this is.
        destinations: The rank's rows of each parameter, contiguous, on any device; other dtypes are converted to.
        options: Threads and checks.
        progress: Told how many bytes each finished read brought.
        relay: The ranks that hold some of it alike, when only one of them is to read it; all of these make the same call.

    Raises:
        ValueError: A file is damaged, or a weight holds NaN or Inf.
    """
    reads = plan(weights, fsdp, coordinate, checkpoint.index, checkpoint.dialect, config)
    verify.check_complete(weights, fsdp, coordinate, reads)
    read = read_all if relay is None else relay.read_all
    report = read(checkpoint.source.root, reads, destinations, options.threads, progress)
    if options.check_finite and report.doubtful:
        verify.check_finite(weights, fsdp, coordinate, destinations)
    return report

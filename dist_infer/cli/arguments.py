"""From the words of a command line to options."""

from __future__ import annotations

from collections.abc import Sequence

from dist_infer.config.options import Options, read_options


def parse(arguments: Sequence[str]) -> Options:
    """Options from `--config FILE` and `key=value` words.

    Raises:
        ValueError, FileNotFoundError: As `read_options`; also for a `--flag` that does not exist.
    """
    config: str | None = None
    overrides: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--config":
            config = next(words, None)
            if config is None:
                raise ValueError("--config: name a YAML file")
        elif word.startswith("--config="):
            config = word.removeprefix("--config=")
        elif word.startswith("-"):
            raise ValueError(f"{word}: there is no such flag; options are key=value, and --config FILE.yaml")
        else:
            overrides.append(word)
    return read_options(overrides, config)

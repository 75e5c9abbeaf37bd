"""A configuration file, parsed."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any


def parse(path: Path) -> Any:
    """The content of `path`, by its suffix: JSON, TOML, or else YAML.

    Raises:
        ValueError: It cannot be parsed.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return json.loads(text)
        return tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not readable: {' '.join(str(error).split())}") from error


def only(data: dict[str, Any], where: str, **valid: Any) -> None:
    """Check that what `data` says of each field of `valid` is nothing, or that one value.

    Raises:
        ValueError: It says something else, which the decoder does not do.
    """
    for name, value in valid.items():
        if data.get(name) is not None and data[name] != value:
            raise ValueError(f"{where}{name} = {data[name]!r} is not supported; supported is {value!r}")


def choose(table: dict[str, Any], name: str, value: Any) -> Any:
    """What `table` has for `value`, which the file calls `name`.

    Raises:
        ValueError: It has nothing.
    """
    if value not in table:
        raise ValueError(f"{name} = {value!r} is not supported; supported are {', '.join(map(str, table))}")
    return table[value]

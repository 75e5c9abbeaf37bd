"""How an option is declared: a default, one sentence, and the range it must lie in."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import Field, field, fields
from typing import Any


def option(
    default: Any = None,
    doc: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: Iterable[str] | None = None,
) -> Any:
    """A dataclass field that carries its own documentation and range.

    Args:
        default: The default; a list or dict is copied for each instance.
        doc: One sentence, shown by ``--help``.
        low: Smallest value allowed.
        high: Largest value allowed.
        above: The value must be strictly greater than this.
        choices: The values allowed.
    """
    metadata = {"doc": doc, "low": low, "high": high, "above": above, "choices": choices}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_ranges(options: Any, prefix: str) -> None:
    """Raise ValueError for the first field of `options` that lies outside its declared range."""
    for item in fields(options):
        check_range(item, getattr(options, item.name), prefix)


def check_range(item: Field[Any], value: Any, prefix: str) -> None:
    """Raise ValueError unless `value` is allowed for `item`; None always is."""
    limits = item.metadata
    if value is None or not limits:
        return
    name = f"{prefix}.{item.name}" if prefix else item.name
    choices = limits.get("choices")
    if choices is not None and value not in choices:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(choices)}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not math.isfinite(value):
        raise ValueError(f"{name}={value}: must be a finite number")
    low, high, above = limits.get("low"), limits.get("high"), limits.get("above")
    if low is not None and value < low:
        raise ValueError(f"{name}={value}: must be at least {low}")
    if above is not None and value <= above:
        raise ValueError(f"{name}={value}: must be greater than {above}")
    if high is not None and value > high:
        raise ValueError(f"{name}={value}: must be at most {high}")

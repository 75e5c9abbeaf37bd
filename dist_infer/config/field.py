"""How an option is declared: a type, a default, one sentence, and the range it must lie in."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import Field, field, fields
from functools import cache
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

_WORDS: dict[Any, tuple[str, str]] = {
    Any: ("a value", "values"),
    list[Any]: ("a list of values", "lists of values"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", ""),
    str: ("text", "texts"),
}


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
    """Raise ValueError for the first field of `options` whose value is of the wrong type or outside its declared range."""
    hints = _hints(type(options))
    for item in fields(options):
        check_range(item, getattr(options, item.name), prefix, hints[item.name])


def check_range(item: Field[Any], value: Any, prefix: str, hint: Any) -> None:
    """Raise ValueError unless `value` is allowed for `item`, whose type is `hint`."""
    limits = item.metadata
    if not limits:
        return
    name = f"{prefix}.{item.name}" if prefix else item.name
    if not _is(value, hint):
        raise ValueError(f"{name}={value!r}: must be {_named(hint)}")
    if value is None:
        return
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


@cache
def _hints(options: type) -> dict[str, Any]:
    return get_type_hints(options)


def _is(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type `hint`: any, a plain one, a list, a dict, or one of several."""
    if hint is Any:
        return True
    kind, inner = get_origin(hint), get_args(hint)
    if kind is list:
        return isinstance(value, list | tuple) and all(_is(part, inner[0]) for part in value)
    if kind is dict:
        return isinstance(value, dict) and all(_is(key, inner[0]) and _is(part, inner[1]) for key, part in value.items())
    if inner:
        return any(_is(value, one) for one in inner)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float if hint is float else hint)


def _named(hint: Any) -> str:
    """The type `hint` in words."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind is list:
        return f"a list of {_WORDS[inner[0]][1]}"
    if kind is dict:
        return f"{_WORDS[inner[0]][1]}, each with {_WORDS[inner[1]][0]}"
    return _named(next(one for one in inner if one is not NoneType)) if inner else _WORDS[hint][0]

"""Our own YAML (or JSON): fields of ModelConfig by their names. What the weights' shapes tell may be left out."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from dist_infer.checkpoint.configurations.shapes import Shapes
from dist_infer.model.config import ExpertsConfig, ModelConfig
from dist_infer.model.families import FAMILIES


def recognizes(data: dict[str, Any]) -> bool:
    """It names a family, or nothing but fields of ours."""
    known = {field.name for field in fields(ModelConfig)}
    return "family" in data or (bool(data) and data.keys() <= known)


def read(data: dict[str, Any], shapes: Shapes) -> ModelConfig:
    """The fields that are given, and from the shapes those that are not."""
    values = _checked("", data, ModelConfig)
    if "experts" in values and isinstance(values["experts"], dict):
        values["experts"] = _checked("experts.", values["experts"], ExpertsConfig)
    if values.get("family", FAMILIES[0]) not in FAMILIES:
        raise ValueError(f"family {values['family']!r} is not supported; supported are {', '.join(FAMILIES)}")
    for name in ("rope", "local_rope"):
        if values.get(name) is not None:
            values[name] = {key: _number(f"{name}.{key}", value) for key, value in values[name].items()}
    return shapes.complete(values)


def _checked(prefix: str, data: dict[str, Any], kind: type[ModelConfig] | type[ExpertsConfig]) -> dict[str, Any]:
    """`data`, its names and types checked against the fields of `kind`."""
    known = {field.name: str(field.type) for field in fields(kind)}
    for name in data:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"valid are {', '.join(known)}"
            raise ValueError(f"unknown field {f'{prefix}{name}'!r}; {hint}")
    return {name: _typed(f"{prefix}{name}", known[name], value) for name, value in data.items()}


def _typed(name: str, annotation: str, value: Any) -> Any:
    """`value` as the field `name` wants it (YAML reads 1e-5 as text and knows no tuples)."""
    if value is None and "None" in annotation:
        return None
    if annotation.startswith("tuple") and isinstance(value, list):
        return tuple(value)
    first = annotation.split(" ")[0].split("[")[0]
    wanted = {"int": int, "str": str, "bool": bool, "dict": dict, "float": float, "ExpertsConfig": dict}.get(first)
    if wanted is float and isinstance(value, int | str) and not isinstance(value, bool):
        value = float(_number(name, value))
    if wanted is None or not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise ValueError(f"{name} = {value!r} is not a {annotation}")
    return value


def _number(name: str, value: Any) -> Any:
    """A rotary parameter: all but the type are numbers, or lists of them."""
    if isinstance(value, list):
        return [_number(name, one) for one in value]
    if name.endswith(".rope_type") or isinstance(value, int | float):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} = {value!r} is not a number") from None

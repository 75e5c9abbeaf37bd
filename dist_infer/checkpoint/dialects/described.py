"""Dialects that users describe in YAML."""

from __future__ import annotations

import difflib
import string
from pathlib import Path
from typing import Any

from dist_infer.checkpoint.dialects.table import Entry, Place, TableDialect

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LAYER = "model.layers.{layer}"
_KNOWN = (
    *("model.embed_tokens", "model.embed_positions", "model.norm", "lm_head"),
    *(f"{_LAYER}.{norm}_layernorm" for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward")),
    *(f"{_LAYER}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *(f"{_LAYER}.mlp.{module}{name}" for module in ("", "experts.{expert}.", "shared_expert.") for name in _PROJECTIONS[4:]),
    *(f"{_LAYER}.mlp.{name}" for name in ("gate", "shared_expert_gate")),
)
_EXACT = f"{_LAYER}.mlp.gate.e_score_correction_bias"
_FIELDS = ("name", "rotary", "prefix", "weights", "ignored")
_PLACE_FIELDS = ("name", "parts", "grouped", "packed", "transposed")


def is_description(wanted: str) -> bool:
    """Whether `wanted` names a file rather than a dialect."""
    return wanted.endswith((".yaml", ".yml"))


def read_dialect(file: str) -> type[TableDialect]:
    """The dialect that the YAML file `file` describes; docs/checkpoints.md says how one is written.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It does not describe a dialect; the message names the key.
    """
    import yaml

    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"model.dialect={file}: no such file")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"model.dialect={file}: not readable as YAML: {' '.join(str(error).split())}") from error
    try:
        return _dialect(data, path.stem)
    except ValueError as error:
        raise ValueError(f"model.dialect={file}: {error}") from error


def _dialect(data: Any, stem: str) -> type[TableDialect]:
    _check_fields("", data, _FIELDS)
    rotary = data.get("rotary")
    if rotary not in ("half", "interleaved"):
        raise ValueError(f"rotary: {rotary!r} must be half (pairs are i and i + head_dim / 2) or interleaved (2i and 2i + 1)")
    weights = data.get("weights")
    if not isinstance(weights, dict) or not weights:
        raise ValueError("weights: must map canonical names, such as model.embed_tokens, to stored ones")
    table: dict[str, Entry] = {}
    for key, value in weights.items():
        _check_canonical(key)
        places = tuple(_place(f"weights.{key}", key, one, rotary) for one in (value if isinstance(value, list) else [value]))
        if not places:
            raise ValueError(f"weights.{key}: is empty")
        table[key] = places
    for wanted in ("model.embed_tokens", f"{_LAYER}.self_attn.o_proj"):
        if wanted not in table and f"{wanted}.weight" not in table:
            raise ValueError(f"weights.{wanted}: is missing; a checkpoint is known by it")
    ignored = data.get("ignored", [])
    if not isinstance(ignored, list):
        raise ValueError("ignored: must be a list of stored names")
    for name in ignored:
        _check_name("ignored", name, ("layer", "expert"))
    fixed = data.get("prefix")
    if fixed is not None and not isinstance(fixed, str):
        raise ValueError(f"prefix: {fixed!r} is no text")

    class Described(TableDialect):
        """What the file says."""

        @classmethod
        def prefixes(cls, names: Any) -> list[str]:
            return [prefix for prefix in super().prefixes(names) if fixed in (None, prefix)]

    Described.name, Described.rotary, Described.table, Described.ignored = str(data.get("name", stem)), rotary, table, tuple(ignored)
    return Described


def _place(where: str, key: str, value: Any, rotary: str) -> Place:
    """One place of canonical name `key`."""
    if isinstance(value, str):
        value = {"name": value}
    _check_fields(where, value, _PLACE_FIELDS)
    numbers = [number for number in ("layer", "expert") if f"{{{number}}}" in key]
    packed = _flag(where, value, "packed")
    if packed:
        if "expert" not in numbers:
            raise ValueError(f"{where}.packed: only experts lie in packs")
        numbers.remove("expert")
    name = _check_name(f"{where}.name", value.get("name"), (*numbers, "kind"))
    for number in numbers:
        if f"{{{number}}}" not in name:
            raise ValueError(f"{where}.name: {name!r} must contain {{{number}}}")
    grouped, transposed, parts = _flag(where, value, "grouped"), _flag(where, value, "transposed"), value.get("parts", [])
    leaf = key.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
    if not isinstance(parts, list) or not all(part in _PROJECTIONS if isinstance(part, str) else _is_count(part) for part in parts):
        raise ValueError(f"{where}.parts: {parts!r} must list projections ({', '.join(_PROJECTIONS)}) and numbers of rows to skip")
    if (parts or packed or transposed) and leaf not in _PROJECTIONS and not (transposed and leaf in ("embed_tokens", "lm_head", "gate")):
        raise ValueError(f"{where}: {leaf} is no matrix that can be fused, packed or transposed")
    if parts and parts.count(leaf) != 1:
        raise ValueError(f"{where}.parts: {parts!r} must contain {leaf} once")
    if grouped and (not parts or not {part for part in parts} <= {"q_proj", "k_proj", "v_proj"}):
        raise ValueError(f"{where}.grouped: only q_proj, k_proj and v_proj, as `parts`, are interleaved by KV group")
    if transposed and rotary == "interleaved" and leaf in ("q_proj", "k_proj"):
        raise ValueError(f"{where}.transposed: interleaved rotary pairs in a transposed matrix are not supported")
    return Place(name, tuple(parts), grouped, packed, transposed)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_fields(where: str, value: Any, valid: tuple[str, ...]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'the file'}: must hold {', '.join(valid)}")
    for key in value:
        if key not in valid:
            near = difflib.get_close_matches(str(key), valid, n=1)
            hint = f"did you mean {near[0]}?" if near else f"valid are {', '.join(valid)}"
            raise ValueError(f"{f'{where}.' if where else ''}{key}: there is no such field; {hint}")


def _check_canonical(key: Any) -> None:
    path = key.removesuffix(".weight").removesuffix(".bias") if isinstance(key, str) else ""
    if path not in _KNOWN and key != _EXACT:
        near = difflib.get_close_matches(path, _KNOWN, n=1)
        raise ValueError(f"weights.{key}: there is no such canonical name" + (f"; did you mean {near[0]}?" if near else ""))


def _check_name(where: str, name: Any, valid: tuple[str, ...]) -> str:
    """`name`, when it is a text whose only braces are fields of `valid`."""
    try:
        found = [field for _, field, _, _ in string.Formatter().parse(name) if field is not None]
    except (TypeError, ValueError):
        found = [""]
    if not name or not isinstance(name, str) or any(field not in valid for field in found):
        raise ValueError(f"{where}: {name!r} must be a stored name; in it {', '.join(f'{{{field}}}' for field in valid)} may stand")
    return name


def _flag(where: str, value: dict[str, Any], field: str) -> bool:
    flag = value.get(field, False)
    if not isinstance(flag, bool):
        raise ValueError(f"{where}.{field}: {flag!r} must be true or false")
    return flag

"""All options of a run, merged from defaults, a YAML file and `key=value` overrides.

User text (prompts and stop strings) never passes through OmegaConf or YAML's type guessing, so
`${x}`, `yes` and `1e3` stay what they are. Other text (paths, names) is not guessed at either, so `2024_01`
is a directory and no number; OmegaConf's interpolations work there.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dist_infer.config.cluster import ClusterOptions
from dist_infer.config.engine import EngineOptions
from dist_infer.config.eval import EvalOptions
from dist_infer.config.field import check_ranges, option
from dist_infer.config.loader import LoaderOptions
from dist_infer.config.model import ModelOptions
from dist_infer.config.parallel import ParallelOptions
from dist_infer.config.sampling import SamplingParams
from dist_infer.config.sweep import SweepOptions
from dist_infer.config.workload import WorkloadOptions

TEXT_KEYS = ("prompts", "sampling.stop", "system")
STRINGS = ("str", "str | None")
MAPPINGS = ("sampling.logit_bias", "eval.gen_kwargs", "sweep.grid")  # what is below these is a value, not an option
NOT_OF_RESULTS = ("prompts", "input", "output", "journal", "logs", "status", "format", "system", "sweep.", "cluster.", "workload.")


@dataclass
class Options:
    """Everything a user can set."""

    model: ModelOptions = field(default_factory=ModelOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    loader: LoaderOptions = field(default_factory=LoaderOptions)
    eval: EvalOptions = field(default_factory=EvalOptions)
    sweep: SweepOptions = field(default_factory=SweepOptions)
    cluster: ClusterOptions = field(default_factory=ClusterOptions)
    workload: WorkloadOptions = field(default_factory=WorkloadOptions)
    prompts: list[str] = option([], "prompts to continue, streamed to the terminal")
    input: str | None = option(None, "JSONL file of requests")
    output: str | None = option(None, "JSONL file of results; of an export, an eval or a sweep, a directory; of a plan, a JSON file")
    journal: str | None = option(None, "directory where every leader writes down what it finished; of a sweep: OUTPUT/journal")
    logs: str | None = option(None, "directory of log files, one a rank; of a sweep: OUTPUT/logs")
    status: str | None = option(None, "JSON file that says how the run ended, for scripts")
    format: str = option("safetensors", "what an export writes", choices=("safetensors", "dcp"))
    system: str | None = option(None, "system message of a chat")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))

    def check(self) -> None:
        """Raise ValueError for the first value out of its range."""
        check_ranges(self, "")
        for item in fields(self):
            value = getattr(self, item.name)
            if is_dataclass(value):
                check_ranges(value, item.name)

    def to_json(self) -> dict[str, Any]:
        """All values, as JSON can hold them."""
        return asdict(self)

    def changed(self) -> dict[str, Any]:
        """What differs from the defaults and can matter to a result, by dotted key."""
        default = _flat_values(Options())
        return {key: value for key, value in _flat_values(self).items() if value != default[key] and not key.startswith(NOT_OF_RESULTS)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Options:
        """The options that `to_json` wrote."""
        sections = {item.name: item.default_factory for item in fields(cls) if is_dataclass(item.default_factory)}
        values: dict[str, Any] = {}
        for name, value in data.items():
            section = sections.get(name)
            if section is SamplingParams and value["logit_bias"]:
                value = {**value, "logit_bias": {int(token): bias for token, bias in value["logit_bias"].items()}}
            values[name] = section(**value) if section is not None else value  # type: ignore[operator]
        return cls(**values)


def read_options(overrides: Sequence[str] = (), config: str | None = None) -> Options:
    """The options of a run: defaults, then the YAML file `config`, then `key=value` overrides.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: An unknown key (the nearest valid one is named), or a value of the wrong type or out of range.
    """
    texts: dict[str, Any] = {}
    values: dict[str, Any] = {}
    if config is not None:
        values = _read_yaml(config, texts)
    pairs = [_split(override) for override in overrides]
    known = known_keys()
    _refuse_unknown([*_flat_keys(values), *(key for key, _ in pairs)], known)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Options), OmegaConf.create(values))
        for key, text in pairs:
            if key in TEXT_KEYS:
                texts[key] = _text_list(text) if key != "system" else text
            elif known[key].type in STRINGS:
                OmegaConf.update(merged, key, None if text in ("", "null") else text)
            else:
                merged.merge_with_dotlist([f"{key}={text}"])
        options = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(_one_line(error)) from None
    assert isinstance(options, Options)
    if "prompts" in texts:
        options.prompts = texts["prompts"]
    if "system" in texts:
        options.system = texts["system"]
    if "sampling.stop" in texts:
        options.sampling.stop = texts["sampling.stop"]
        options.sampling.__post_init__()
    options.check()
    return options


def known_keys() -> dict[str, Any]:
    """Every key a user can set, and its dataclass field."""
    keys: dict[str, Any] = {}
    for item in fields(Options):
        if is_dataclass(item.default_factory):
            keys.update({f"{item.name}.{inner.name}": inner for inner in fields(item.default_factory)})
        else:
            keys[item.name] = item
    return keys


def _flat_values(options: Options) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in asdict(options).items():
        section = is_dataclass(getattr(options, name))
        values.update({f"{name}.{inner}": v for inner, v in value.items()} if section else {name: value})
    return values


def _split(override: str) -> tuple[str, str]:
    key, sign, text = override.partition("=")
    if not sign:
        raise ValueError(f"{override!r}: an option is key=value, such as model.path=DIRECTORY")
    return key.strip(), text


def _text_list(text: str) -> list[str]:
    """`["a", "b"]`, `[a, b]` or one plain text."""
    if text.startswith("["):
        for parse in (json.loads, _plain_yaml):
            try:
                items = parse(text)
            except (ValueError, yaml.YAMLError):
                continue
            if isinstance(items, list) and all(isinstance(item, str) for item in items):
                return items
    return [text]


def _plain_yaml(source: str) -> Any:
    """What YAML holds, every scalar as the text it is."""
    return yaml.load(source, Loader=yaml.BaseLoader)


def _read_yaml(path: str, texts: dict[str, Any]) -> dict[str, Any]:
    """The values in a YAML file; those of `TEXT_KEYS` are moved to `texts`, unread."""
    try:
        with open(path, encoding="utf-8") as file:
            source = file.read()
    except OSError as error:
        raise FileNotFoundError(f"--config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    try:
        values, plain = yaml.safe_load(source) or {}, _plain_yaml(source) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: must hold options by name, such as 'model:' and 'parallel:' sections")
    values = {key: value for key, value in values.items() if value is not None}  # a section with nothing in it
    for key, item in known_keys().items():
        section, _, name = key.rpartition(".")
        if section and key in values:
            raise ValueError(f"--config {path}: {key}: write a section, '{section}:' and below it '{name}:'")
        typed_values, plain_values = (values.get(section), plain.get(section)) if section else (values, plain)
        if not isinstance(typed_values, dict) or not isinstance(plain_values, dict):
            continue
        text = plain_values.get(name)
        if typed_values.get(name) is None or text is None:
            continue
        if key in TEXT_KEYS:
            del typed_values[name]
            texts[key] = text if key == "system" or isinstance(text, list) else [text]
        elif item.type in STRINGS and isinstance(text, str):
            typed_values[name] = text
    return values


def _flat_keys(values: dict[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in MAPPINGS:
            yield from _flat_keys(value, f"{name}.")
        else:
            yield name


def _refuse_unknown(keys: Iterable[str], known: Collection[str]) -> None:
    for key in keys:
        if key in known:
            continue
        near = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
        near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "; --help lists the valid ones"
        raise ValueError(f"{key}: there is no such option{hint}")


def _one_line(error: Exception) -> str:
    """The message of an OmegaConf or YAML error, with its key, on one line."""
    key = getattr(error, "full_key", None)
    message = str(error).split("\n")[0]
    return f"{key}: {message}" if key else " ".join(str(error).split())

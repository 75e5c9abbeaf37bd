"""The help of a subcommand, made from the option classes."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from dist_infer.config.options import Options

NOTES = {
    "generate": "Give prompts=[...] to stream answers to the terminal, or input=FILE.jsonl output=FILE.jsonl. An input line has id and\n"
    "one of prompt, messages, prompt_token_ids, and may have its own sampling object. A run that was cut continues when started again.",
    "chat": "Type a message; /reset begins anew, /exit or end of input leaves. system=TEXT sets the system message.",
    "score": "input=FILE.jsonl output=FILE.jsonl; a line has context and continuation, or context_token_ids and continuation_token_ids.",
    "export": "Needs model.path and output=DIRECTORY; format=dcp for DCP, model.dtype to convert. parallel.* says how many ranks write.",
    "inspect": "Needs model.path only; parallel.* and model.config show the cut for a mesh and whether weights match the model.",
}


def describe_options(command: str, what: str) -> str:
    """The text of `dist-infer COMMAND --help`."""
    lines = [
        f"usage: dist-infer {command} [--config FILE.yaml] [key=value ...]",
        "",
        what[:1].upper() + what[1:] + ".",
        NOTES.get(command, ""),
        "",
    ]
    for item in fields(Options):
        section = item.default_factory
        if isinstance(section, type) and is_dataclass(section):
            lines += [f"{item.name}: {(section.__doc__ or '').strip()}"]
            lines += [_line(f"{item.name}.{inner.name}", inner) for inner in fields(section)]
            lines.append("")
    lines += [_line(item.name, item) for item in fields(Options) if item.metadata]
    return "\n".join(lines)


def _line(name: str, item: Field[Any]) -> str:
    default = item.default if item.default is not MISSING else None
    shown = f" [{default}]" if default not in (None, "") else ""
    choices = item.metadata.get("choices")
    listed = f" ({', '.join(choices)})" if choices else ""
    return f"  {name:<32} {item.metadata['doc']}{listed}{shown}"

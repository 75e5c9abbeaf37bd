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
    "eval": "Needs model.path and eval.tasks=[a,b]; eval.include_path=DIRECTORY finds task files of your own. output=DIRECTORY gets\n"
    "results.json and samples_TASK.jsonl; a table is printed. sampling.* goes over what tasks say of generation.",
    "sweep": "The first word may be FILE.yaml. sweep.checkpoints x sweep.grid, each with eval.tasks and sweep.inputs; output=DIRECTORY.\n"
    "Each checkpoint is loaded once; what is finished is in a journal, and the same sweep, started again on any ranks, goes on from there.",
    "export": "Needs model.path and output=DIRECTORY; format=dcp for DCP, model.dtype to convert. parallel.* says how many ranks write.",
    "report": "DIR holds results of a sweep or an eval, or results_*.json of lm_eval; several are compared with the first. The page\n"
    "goes to DIR/report.html, for several to comparison/report.html; plots/*.png and summary.csv go beside it. No ranks are started.",
    "inspect": "Needs model.path only; parallel.* and model.config show the cut for a mesh and whether weights match the model.",
    "plan": "model.path is a checkpoint, or a config.json of a model without weights yet; cluster.* and workload.* say where and what.\n"
    "Axes given by parallel.* are kept, the others tried. No ranks are started, no weights read; output=FILE.json gets every figure.",
    "env": "Needs nothing; model.path=CHECKPOINT adds what that is. Of the environment it prints only variables it knows by name.",
}

WITHOUT_OPTIONS = {"report": "DIR... [output=FILE.html]"}  # runs no model


def describe_options(command: str, what: str) -> str:
    """The text of `dist-infer COMMAND --help`."""
    if command in WITHOUT_OPTIONS:
        return f"usage: dist-infer {command} {WITHOUT_OPTIONS[command]}\n\n{what[:1].upper()}{what[1:]}.\n{NOTES[command]}"
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

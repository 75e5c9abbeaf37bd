"""The program: finds the subcommand and says in one line what went wrong."""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Sequence

from dist_infer.cli.outcome import FAILURE, MISTAKE, STOPPED, exit_status
from dist_infer.distributed.logs import console

COMMANDS = {
    "generate": "continue prompts, on the terminal or from a file",
    "chat": "a conversation in the terminal",
    "score": "how likely continuations are",
    "eval": "tasks of lm-evaluation-harness on a checkpoint",
    "sweep": "evaluate many checkpoints on the same tasks, with one report",
    "export": "write a model anew, as transformers and others read it",
    "report": "results of sweeps and evaluations as one page, plots and a table",
    "inspect": "what a checkpoint is, and what each rank would read and hold",
    "plan": "memory, speed and load time of a model on a cluster, mesh by mesh",
    "env": "what a bug report needs: versions, devices, job, checkpoint",
}
HIDDEN = ("worker",)  # started by rank 0, not by people

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit status: 2 for a user's mistake, 1 for a failure, 75 when a signal stopped it."""
    try:
        status = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"dist-infer {version('dist_infer')}")
        return 0
    command, *rest = arguments
    if command not in (*COMMANDS, *HIDDEN):
        return _complain(f"{command!r} is no command; the commands are {', '.join(COMMANDS)}", MISTAKE)
    if "-h" in rest or "--help" in rest:
        from dist_infer.cli.usage import describe_options

        print(describe_options(command, COMMANDS.get(command, "")))
        return 0
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a prompt or an id may hold half a character
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice is for training scripts
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # c10d's stack traces would follow the line that says what happened
    try:
        return importlib.import_module(f"dist_infer.cli.{command}").run(rest)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        status, text = exit_status(error), str(error) or type(error).__name__
        return _complain(f"{text}; the same command goes on from here" if status == STOPPED else text, status)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)


def _complain(message: str, status: int) -> int:
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(f"dist-infer: error: {' '.join(message.split())}", file=console(), flush=True)
    return status


def _usage() -> str:
    lines = [
        "usage: dist-infer COMMAND [--config FILE.yaml] [key=value ...]",
        "",
        "Text and scores from a sharded checkpoint, where it lies.",
        "",
    ]
    lines += [f"  {name:<10} {what}" for name, what in COMMANDS.items()]
    lines += [
        "",
        "dist-infer COMMAND --help lists every option. Example:",
        "  dist-infer generate model.path=runs/step_50000 parallel.tp=2 'prompts=[\"Hello\"]'",
    ]
    return "\n".join(lines)

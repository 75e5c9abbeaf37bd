"""`dist-infer generate`: continue prompts, on the terminal or from a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dist_infer.cli.arguments import parse
from dist_infer.cli.jobs import FileJob
from dist_infer.cli.ranks import run_on_ranks, say
from dist_infer.cli.terminal import Terminal
from dist_infer.config.options import Options
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.intake import Intake
from dist_infer.engine.report import summary
from dist_infer.engine.request import Request, Result
from dist_infer.engine.session import Session


def run(arguments: Sequence[str]) -> int:
    """Run the command."""
    options = parse(arguments)
    if bool(options.prompts) == bool(options.input):
        raise ValueError(
            "nothing to do: give prompts=[...] or input=FILE.jsonl" if not options.prompts else "give prompts or input, not both"
        )
    if options.input is not None:
        job = FileJob(options, lambda intake: intake.line)
        return run_on_ranks(options, job.run, job.check, stoppable=True)
    return run_on_ranks(options, lambda session: _stream(session, options), lambda blueprint: _check(blueprint, options))


def _check(blueprint: Blueprint, options: Options) -> None:
    """Refuse at once what no prompt can be run without."""
    if options.output is not None:
        raise ValueError("output=FILE goes with input=FILE; prompts stream to the terminal")
    blueprint.need_tokenizer("a text prompt")


def _stream(session: Session, options: Options) -> None:
    intake = Intake(session.blueprint)
    requests: list[Request] = []
    terminal = Terminal(sys.stdout, options.prompts)
    for index, prompt in enumerate(options.prompts):
        try:
            requests.append(intake.request(prompt, index=index))
        except ValueError as error:
            terminal.take([], [Result(str(index), index, error=str(error))])
    try:
        session.run(requests, terminal.take)
    finally:
        terminal.close()
    say(summary(session))

"""`dist-infer chat`: a conversation in the terminal. Each turn finds the ones before it in the prefix cache."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dist_infer.cli.arguments import parse
from dist_infer.cli.ranks import run_on_ranks, say
from dist_infer.config.options import Options
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.engine import Delta
from dist_infer.engine.intake import Intake
from dist_infer.engine.report import summary
from dist_infer.engine.session import Session


def run(arguments: Sequence[str]) -> int:
    """Run the command."""
    options = parse(arguments)
    if options.prompts or options.input or options.output:
        raise ValueError("chat reads the terminal: prompts, input and output belong to generate")
    return run_on_ranks(options, lambda session: _converse(session, options), _check)


def _check(blueprint: Blueprint) -> None:
    if blueprint.need_tokenizer("a chat").chat_template is None:
        raise ValueError("the model's tokenizer has no chat template; use generate for plain prompts")


def _converse(session: Session, options: Options) -> None:
    intake = Intake(session.blueprint)
    opening = [{"role": "system", "content": options.system}] if options.system else []
    messages = list(opening)
    say("type a message; /reset begins anew, /exit leaves")
    while (message := _ask()) is not None:
        if message == "/reset":
            messages = list(opening)
        elif message:
            answer = _answer(session, intake, [*messages, {"role": "user", "content": message}])
            if answer is not None:
                messages += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]
    say(summary(session))


def _ask() -> str | None:
    """The next message; None when the conversation is over."""
    try:
        message = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    return None if message in ("/exit", "/quit") else message


def _answer(session: Session, intake: Intake, messages: list[dict[str, str]]) -> str | None:
    """Stream the answer; a turn that cannot be run costs that turn only."""
    try:
        request = intake.request(messages)
    except ValueError as error:
        say(f"error: {error}")
        return None
    begun = False
    try:
        for event in session.stream(request):
            if isinstance(event, Delta):
                sys.stdout.write(event.text)
                sys.stdout.flush()
                begun = True
            elif event.error is not None:
                say(f"error: {event.error}; this turn is dropped (/reset begins anew)")
                return None
            else:
                begun = True
                return event.outputs[0].text or ""
        return None
    finally:
        if begun:
            print(flush=True)

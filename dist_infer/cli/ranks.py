"""Run a command on all ranks: the conductor does its work, the others serve."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from tqdm import tqdm

from dist_infer.cli.outcome import Outcome
from dist_infer.config.options import Options
from dist_infer.distributed.launch import RankVariables
from dist_infer.distributed.logs import RankLog, console
from dist_infer.distributed.signals import Stopped, StopSignal
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.session import Session
from dist_infer.evaluation.recorder import Recorder


def run_on_ranks(
    options: Options,
    work: Callable[[Session], None],
    check: Callable[[Blueprint], None] | None = None,
    stoppable: bool = False,
    tolerant: bool = False,
) -> int:
    """Open a session, run `work` with it on the conductor, and close it in any case.

    Args:
        options: What the user set.
        work: What the command is for.
        check: Cheap checks on the conductor, before any rank is started or weight read.
        stoppable: SIGTERM and SIGUSR1 stop the run between two steps; else they have their usual meaning.
        tolerant: A damaged checkpoint does not end the run; what is asked of it fails.
    """
    variables = RankVariables.read()
    rank = variables.rank if variables is not None else 0
    outcome, stop = Outcome(options.status, rank), StopSignal()
    try:
        outcome.begin()
        log = RankLog(Path(options.logs), rank) if options.logs is not None else nullcontext()
        with log, stop if stoppable else nullcontext(), Recorder(options.journal) as record:
            make = partial(Session, options, lambda: Blueprint.of(options), say=say, check=check, record=record, stop=stop)
            _run(make(last_words=outcome.end, tolerant=tolerant), work)
    except BaseException as error:
        outcome.end(error)
        raise
    outcome.end(None)
    return 0


def _run(session: Session, work: Callable[[Session], None]) -> None:
    try:
        if session.is_conductor:
            work(session)
        else:
            session.serve()
    except Stopped:
        session.close()
        raise
    except BaseException as error:
        session.close(error)
        raise
    session.close()


def say(line: str) -> None:
    """Print a line about the run, apart from its results."""
    tqdm.write(f"dist-infer: {line}", file=console())  # above a bar, if one is drawn
    console().flush()

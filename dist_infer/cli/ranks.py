"""Run a command on all ranks: the conductor does its work, the others serve."""

from __future__ import annotations

import sys
from collections.abc import Callable

from dist_infer.config.options import Options
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.session import Session


def run_on_ranks(options: Options, work: Callable[[Session], None], check: Callable[[Blueprint], None] | None = None) -> int:
    """Open a session, run `work` with it on the conductor, and close it in any case.

    Args:
        options: What the user set.
        work: What the command is for.
        check: Cheap checks on the conductor, before any rank is started or weight read.
    """
    session = Session(options, lambda: Blueprint.of(options), say=say, check=check)
    try:
        if session.is_conductor:
            work(session)
        else:
            session.serve()
    except BaseException as error:
        session.close(error)
        raise
    session.close()
    return 0


def say(line: str) -> None:
    """Print a line about the run, apart from its results."""
    print(f"dist-infer: {line}", file=sys.stderr, flush=True)

"""What the process of every side does: it answers commands, one line of JSON each, until its input ends.

Runs under the Python of any peer, so it imports the standard library only.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

PR_SET_PDEATHSIG = 1

Command = Callable[..., dict[str, Any]]


def serve(make: Callable[[], dict[str, Command]]) -> None:
    """Make a side, then call the command that each line names with the arguments it gives, and write the answer.

    Args:
        make: Loads what the side needs; returns its commands by name, of which "close", if there is one, is called at the end.
            Whatever is printed meanwhile goes to stderr.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a side that is stopped could not see its input end
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    commands = make()
    for line in sys.stdin:
        given = json.loads(line)
        print(json.dumps(commands[given.pop("do")](**given)), file=answers, flush=True)
    if "close" in commands:
        commands["close"]()


def generated(began: float, times: list[float], counts: list[int], first: float, tokens: list[list[int]]) -> dict[str, Any]:
    """The answer to `generate`.

    Args:
        began: When the requests were handed over.
        times: When each step ended, of the same clock.
        counts: Tokens made until then.
        first: When every sequence had its first token.
        tokens: What was made of each prompt.
    """
    return {"times": [at - began for at in times], "counts": counts, "first": first - began, "tokens": tokens}

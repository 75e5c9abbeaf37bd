"""The harness without its own bars, prints, processes and slow looks at the machine."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import lm_eval.api.task
from torch.utils.collect_env import get_pretty_env_info
from tqdm import tqdm


@contextlib.contextmanager
def quiet(least: int = logging.WARNING) -> Iterator[None]:
    """While entered, the harness says nothing below the logging level `least`.

    Nor does it fork processes for standard errors, which must not happen beside running ranks: other threads may hold locks.
    """
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(max(level, least))
    try:
        with (
            patch.object(lm_eval.api.task, "tqdm", _NoBar),
            patch("tqdm.tqdm", _NoBar),  # for what is imported late
            patch("torch.utils.collect_env.get_pretty_env_info", _environment),
            patch.dict(os.environ, DISABLE_MULTIPROC="1"),
            contextlib.redirect_stdout(sys.stderr),
        ):
            yield
    finally:
        log.setLevel(level)


class _NoBar(tqdm):
    """A bar that is never drawn."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **{**named, "disable": True})


@functools.cache
def _environment() -> str:
    """What torch says of the machine; takes seconds, and does not change."""
    return get_pretty_env_info()

"""A file of requests to a file of results: in any order, once each, and on from where a run was cut.

While it runs, results are appended to `OUTPUT.partial` as they finish. When all are there, they are
put in the order of the input and the file takes its final name; so a file by that name is complete.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dist_infer.cli.ranks import say
from dist_infer.config.options import Options
from dist_infer.distributed.signals import Stopped
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.engine import Delta
from dist_infer.engine.intake import Intake
from dist_infer.engine.report import provenance, summary
from dist_infer.engine.request import Result
from dist_infer.engine.session import Session
from dist_infer.evaluation.request_file import MakeRequest, RequestFile
from dist_infer.evaluation.whole_file import HALF_CHARACTERS, write_whole

SYNC_S = 5.0  # results older than this are on disk


class FileJob:
    """One input file and its output.

    Args:
        options: The run's; `input` and `output` are read.
        reader: From an Intake, the method that makes a request of a line.
    """

    def __init__(self, options: Options, reader: Callable[[Intake], MakeRequest]) -> None:
        assert options.input is not None
        self.options, self.reader = options, reader
        self.input, self.output = Path(options.input), Path(options.output) if options.output is not None else None
        self.lines: dict[int, dict[str, Any]] = {}  # finished, by index of the request
        self.attempt = 1

    def check(self, blueprint: Blueprint) -> None:
        """Read and check the input and what an earlier run left; nothing is written.

        Raises:
            OSError: The input cannot be read, or the output not be written.
            ValueError: The output is complete already.
        """
        if not self.input.is_file():
            raise FileNotFoundError(f"input={self.input}: no such file; name a JSONL file of requests")
        if self.output is not None:
            if self.output.exists():
                raise ValueError(f"output={self.output}: the file is there and complete; remove it or name another")
            if not self.output.absolute().parent.is_dir():
                raise FileNotFoundError(f"output={self.output}: there is no directory {self.output.absolute().parent}")
            if not os.access(self.output.absolute().parent, os.W_OK):
                raise PermissionError(f"output={self.output}: the directory cannot be written to")
        identity = blueprint.checkpoint.identity if blueprint.checkpoint is not None else ""
        self.file = RequestFile(self.input, self.reader(Intake(blueprint)), identity)
        self._resume()

    def run(self, session: Session) -> None:
        """Run what is left, and complete the output."""
        made_by = provenance(session)
        todo = [request for index, request in self.file.requests.items() if index not in self.lines]
        bar = tqdm(total=len(self.file), initial=len(self.lines), unit="request", disable=not sys.stderr.isatty())
        # Closed below, but for stdout.
        out = sys.stdout if self.output is None else open(self._partial, "a", encoding="utf-8", errors=HALF_CHARACTERS)  # noqa: SIM115
        tokens, failed, synced, began = 0, 0, time.monotonic(), time.monotonic()

        def sink(deltas: list[Delta], results: list[Result]) -> None:
            nonlocal tokens, synced, failed
            for result in results:
                if result.usage is not None:
                    tokens += result.usage.completion_tokens or result.usage.prompt_tokens
                line = self.file.line(result, self.attempt, made_by)
                failed += result.error is not None
                self.lines[result.index] = line
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
                bar.update()
            if results:
                bar.set_postfix_str(f"{tokens / (time.monotonic() - began):,.0f} tokens/s", refresh=False)
                out.flush()
            if self.output is not None and time.monotonic() - synced > SYNC_S:
                os.fsync(out.fileno())
                synced = time.monotonic()

        try:
            sink([], self.file.refused)
            session.run(todo, sink)
        except Stopped as stopped:
            raise Stopped(f"{stopped} with {len(self.lines)} of {len(self.file)} requests done") from None
        finally:
            bar.close()
            if self.output is not None:
                out.close()
        if self.output is not None:
            self._complete()
        say(summary(session))
        if failed:
            say(f"{failed} of {len(self.file)} requests failed; their lines have an error")

    @property
    def _partial(self) -> Path:
        assert self.output is not None
        return self.output.with_name(self.output.name + ".partial")

    def _resume(self) -> None:
        """Take over the results of a run that was cut; a torn last line and results of something else are dropped."""
        if self.output is None or not self._partial.exists():
            return
        keys = {index: request.key for index, request in self.file.requests.items()}
        for text in self._partial.read_bytes().split(b"\n")[:-1]:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            self.attempt = max(self.attempt, line["attempt"] + 1)
            if "error" not in line and keys.get(line["index"]) == line["key"]:
                self.lines[line["index"]] = line
        write_whole(self._partial, (json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines.values()))
        say(f"{self._partial}: going on after {len(self.lines)} of {len(self.file)} requests")

    def _complete(self) -> None:
        """Put the results in the order of the input, under the final name."""
        assert self.output is not None
        write_whole(self.output, (json.dumps(self.lines[index], ensure_ascii=False) + "\n" for index in range(len(self.file))))
        self._partial.unlink()

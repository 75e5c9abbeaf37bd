"""A file of requests to a file of results: in any order, once each, and on from where a run was cut.

While it runs, results are appended to `OUTPUT.partial` as they finish. When all are there, they are
put in the order of the input and the file takes its final name; so a file by that name is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dist_infer.cli.ranks import say
from dist_infer.config.options import Options
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.engine import Delta
from dist_infer.engine.intake import Intake
from dist_infer.engine.report import provenance, summary
from dist_infer.engine.request import SCHEMA, Request, Result
from dist_infer.engine.session import Session

MakeRequest = Callable[[Any, int], Request]
SYNC_S = 5.0  # results older than this are on disk
ESCAPED = "backslashreplace"  # half a character in an id is written as JSON's escape for it


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
        self.requests: dict[int, Request] = {}  # by index
        self.lines: dict[int, dict[str, Any]] = {}  # finished, by index of the request
        self.attempt = 1
        self._refused: list[Result] = []
        self._line_numbers: list[int] = []
        self._identity = ""
        self._failed = 0

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
        self._identity = blueprint.checkpoint.identity if blueprint.checkpoint is not None else ""
        self._read(Intake(blueprint))
        self._resume()

    def run(self, session: Session) -> None:
        """Run what is left, and complete the output."""
        made_by = provenance(session)
        todo = [request for index, request in self.requests.items() if index not in self.lines]
        bar = tqdm(total=len(self._line_numbers), initial=len(self.lines), unit="request", disable=not sys.stderr.isatty())
        # Closed below, but for stdout.
        out = sys.stdout if self.output is None else open(self._partial, "a", encoding="utf-8", errors=ESCAPED)  # noqa: SIM115
        tokens, synced, began = 0, time.monotonic(), time.monotonic()

        def sink(deltas: list[Delta], results: list[Result]) -> None:
            nonlocal tokens, synced
            for result in results:
                if result.usage is not None:
                    tokens += result.usage.completion_tokens or result.usage.prompt_tokens
                line = self._line(result, made_by)
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
            sink([], self._refused)
            session.run(todo, sink)
        finally:
            bar.close()
            if self.output is not None:
                out.close()
        if self.output is not None:
            self._complete()
        say(summary(session))
        if self._failed:
            say(f"{self._failed} of {len(self._line_numbers)} requests failed; their lines have an error")

    def _read(self, intake: Intake) -> None:
        """Requests from the input; a bad line fails alone, named by its number."""
        make = self.reader(intake)
        with open(self.input, encoding="utf-8", errors="strict") as file:
            for number, text in enumerate(_lines(file, self.input), 1):
                if not text.strip():
                    continue
                index = len(self._line_numbers)
                self._line_numbers.append(number)
                identifier = str(index)
                try:
                    try:
                        data = json.loads(text)
                    except ValueError as error:
                        raise ValueError(f"not JSON: {error}") from None
                    if isinstance(data, dict) and "id" in data:
                        identifier = str(data["id"])
                    self.requests[index] = make(data, index)
                except ValueError as error:
                    self._refused.append(Result(identifier, index, error=str(error)))

    @property
    def _partial(self) -> Path:
        assert self.output is not None
        return self.output.with_name(self.output.name + ".partial")

    def _resume(self) -> None:
        """Take over the results of a run that was cut; a torn last line and results of something else are dropped."""
        if self.output is None or not self._partial.exists():
            return
        keys = {index: self._key(request) for index, request in self.requests.items()}
        for text in self._partial.read_bytes().split(b"\n")[:-1]:
            try:
                line = json.loads(text)
            except ValueError:
                continue
            self.attempt = max(self.attempt, line["attempt"] + 1)
            if "error" not in line and keys.get(line["index"]) == line["key"]:
                self.lines[line["index"]] = line
        kept = self._partial.with_name(self._partial.name + ".new")
        with open(kept, "w", encoding="utf-8", errors=ESCAPED) as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines.values())
        os.replace(kept, self._partial)
        say(f"{self._partial}: going on after {len(self.lines)} of {len(self._line_numbers)} requests")

    def _complete(self) -> None:
        """Put the results in the order of the input, under the final name."""
        assert self.output is not None
        whole = self.output.with_name(self.output.name + ".new")
        with open(whole, "w", encoding="utf-8", errors=ESCAPED) as file:
            for index in range(len(self._line_numbers)):
                file.write(json.dumps(self.lines[index], ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(whole, self.output)
        self._partial.unlink()

    def _key(self, request: Request) -> str:
        """Hash of what determines the result; a seed that was drawn, not given, is not part of it."""
        what = [self._identity, request.token_ids, asdict(request.params), request.score_from]
        return hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16).hexdigest()

    def _line(self, result: Result, made_by: dict[str, Any]) -> dict[str, Any]:
        line: dict[str, Any] = {"schema": SCHEMA, "id": result.id, "index": result.index, "attempt": self.attempt}
        if result.error is not None:
            self._failed += 1
            return line | {"line": self._line_numbers[result.index], "error": result.error}
        request = self.requests[result.index]
        line["key"] = self._key(request)
        if result.score is not None:
            line |= asdict(result.score)
        else:
            line["outputs"] = [_without_none(asdict(output)) for output in result.outputs]
            line["seed"] = result.seed
            line["sampling"] = _without_none(asdict(request.params))
        assert result.usage is not None
        return line | {"usage": asdict(result.usage), "provenance": made_by}


def _lines(file: Any, path: Path) -> Any:
    try:
        yield from file
    except UnicodeDecodeError as error:
        raise ValueError(f"input={path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _without_none(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value is not None}

"""A JSONL file of requests, and the lines of its results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_infer.engine.request import SCHEMA, Request, Result

MakeRequest = Callable[[Any, int], Request]


class RequestFile:
    """The requests of a file; a bad line fails alone, named by its number.

    Attributes:
        requests: By index, with their keys.
        refused: The results of lines that hold no request.
        line_numbers: Of each index.
        prompts: Those that are text, by index.

    Args:
        path: The file.
        make: A method of an Intake that makes a request of a line.
        identity: The checkpoint's, for the keys.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not UTF-8 text.
    """

    def __init__(self, path: Path, make: MakeRequest, identity: str) -> None:
        self.requests: dict[int, Request] = {}
        self.refused: list[Result] = []
        self.line_numbers: list[int] = []
        self.prompts: dict[int, str] = {}
        with open(path, encoding="utf-8", errors="strict") as file:
            for number, text in enumerate(_lines(file, path), 1):
                if text.strip():
                    self._take(number, text, make, identity)

    def __len__(self) -> int:
        """Lines that are not empty."""
        return len(self.line_numbers)

    def line(self, result: Result, attempt: int, made_by: dict[str, Any]) -> dict[str, Any]:
        """What is written of a result.

        Args:
            result: Of one of these requests.
            attempt: How often the job has been started.
            made_by: Checkpoint, options, versions.
        """
        line: dict[str, Any] = {"schema": SCHEMA, "id": result.id, "index": result.index, "attempt": attempt}
        if result.error is not None:
            return line | {"line": self.line_numbers[result.index], "error": result.error}
        request = self.requests[result.index]
        line["key"] = request.key
        if result.score is not None:
            line |= asdict(result.score)
        else:
            line["outputs"] = [_without_none(asdict(output)) for output in result.outputs]
            line["seed"] = result.seed
            line["sampling"] = _without_none(asdict(request.params))
        assert result.usage is not None
        return line | {"usage": asdict(result.usage), "provenance": made_by}

    def _take(self, number: int, text: str, make: MakeRequest, identity: str) -> None:
        index = len(self.line_numbers)
        self.line_numbers.append(number)
        identifier = str(index)
        try:
            try:
                data = json.loads(text)
            except ValueError as error:
                raise ValueError(f"not JSON: {error}") from None
            if isinstance(data, dict) and "id" in data:
                identifier = str(data["id"])
            request = self.requests[index] = make(data, index)
            request.key = request.key_for(identity)
            if isinstance(data.get("prompt"), str):
                self.prompts[index] = data["prompt"]
        except ValueError as error:
            self.refused.append(Result(identifier, index, error=str(error)))


def _lines(file: Any, path: Path) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError as error:
        raise ValueError(f"input={path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _without_none(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value is not None}

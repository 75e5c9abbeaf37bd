"""Several outputs on one terminal: the first unfinished one streams, the others wait for their turn."""

from __future__ import annotations

from typing import TextIO

from dist_infer.engine.engine import Delta
from dist_infer.engine.request import Result

Place = tuple[int, int]  # index of the request, index of the output


class Terminal:
    """Prints outputs in the order of their prompts.

    Args:
        stream: Where to.
        prompts: What was asked; shown before each answer when there is more than one.
    """

    def __init__(self, stream: TextIO, prompts: list[str]) -> None:
        self.stream, self.prompts = stream, prompts
        self._texts: dict[Place, str] = {}
        self._results: dict[int, Result] = {}
        self._now: Place = (0, 0)
        self._shown = 0
        self._titled = False

    def take(self, deltas: list[Delta], results: list[Result]) -> None:
        """Take in what a step brought, and print what may be seen."""
        for delta in deltas:
            place = (delta.request.index, delta.index)
            self._texts[place] = self._texts.get(place, "") + delta.text
        for result in results:
            self._results[result.index] = result
            for index, output in enumerate(result.outputs):
                self._texts[result.index, index] = output.text or ""
        self._print()

    def close(self) -> None:
        """No more will come; a line that was begun is ended, so that an error stands on a line of its own."""
        self._print()
        if self._shown:
            self.stream.write("\n")
        self.stream.flush()

    def _print(self) -> None:
        while self._now[0] < len(self.prompts):
            request, index = self._now
            result, text = self._results.get(request), self._texts.get(self._now)
            if result is None and not text:
                break
            if result is not None and result.error is not None:
                self._title()
                self.stream.write(f"[error: {result.error}]\n")
                self._next(request + 1, 0)
                continue
            self._title()
            self.stream.write((text or "")[self._shown :])
            self._shown = len(text or "")
            if result is None:
                break
            self.stream.write("\n")
            self._next(*((request, index + 1) if index + 1 < len(result.outputs) else (request + 1, 0)))
        self.stream.flush()

    def _title(self) -> None:
        """The prompt, once, before its answer."""
        if not self._titled and len(self.prompts) > 1:
            self.stream.write(f"> {self.prompts[self._now[0]]}\n" if self._now[1] == 0 else f"[{self._now[1] + 1}] ")
        self._titled = True

    def _next(self, request: int, index: int) -> None:
        self._now, self._shown, self._titled = (request, index), 0, False

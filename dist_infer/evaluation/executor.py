"""Answers requests: from the journal where it knows the result, else by running them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dist_infer.engine.engine import Delta
from dist_infer.engine.request import Request, Result
from dist_infer.engine.session import Session
from dist_infer.evaluation.journal import Journal
from dist_infer.evaluation.progress import Progress


class CheckpointFailed(Exception):
    """A checkpoint cannot be used, which says nothing of the others."""


class Executor:
    """The conductor's way from requests to results, for one checkpoint after another.

    A checkpoint is only loaded when something must be run with it. Results are recorded in the journal by the leaders that
    compute them, not here.

    Attributes:
        asked: Requests it was given so far.

    Args:
        session: The running model.
        journal: What is finished already.
        progress: Told of all results.
    """

    def __init__(self, session: Session, journal: Journal, progress: Progress) -> None:
        self.session, self.journal, self.progress = session, journal, progress
        self._path = str(session.blueprint.options.model.path)
        self._loaded = self._path if session.resident.lost is None else None
        self._then: str | None = None
        self.asked = 0

    def use(self, path: str, then: str | None = None) -> None:
        """Run requests with the checkpoint at `path` from now on; bring `then`, which comes next, nearer meanwhile."""
        self._path, self._then = path, then

    def run(self, requests: list[Request]) -> list[Result]:
        """The results of `requests`, which have keys, in their order; requests of one key are run once.

        Raises:
            CheckpointFailed: The checkpoint that is to be asked is damaged.
            Stopped: A signal came; what is finished is in the journal.
            RankFailure: A rank failed.
        """
        self.asked += len(requests)
        self.progress.add(len(requests))
        self.journal.refresh()
        found: dict[str, Result] = {}
        todo: dict[str, Request] = {}
        for request in requests:
            if request.key not in found and request.key not in todo:
                known = self.journal.find(request.key)
                if known is not None:
                    found[request.key] = known
                else:
                    todo[request.key] = request
        self.progress.found(len(requests) - len(todo))
        if todo:
            self._load()
            self.session.run(list(todo.values()), self._sink(found))
        return [replace(found[request.key], id=request.id, index=request.index) for request in requests]

    def _sink(self, found: dict[str, Result]) -> Callable[[list[Delta], list[Result]], None]:
        def sink(deltas: list[Delta], results: list[Result]) -> None:
            for result in results:
                found[result.key] = result
            if results:
                self.progress.take(results)

        return sink

    def _load(self) -> None:
        if self._path != self._loaded:
            self._loaded = None
            try:
                self.session.swap(self._path)
            except ValueError as error:
                raise CheckpointFailed(str(error)) from error
            self._loaded = self._path
        if self._then is not None:
            self.session.prefetch(self._then)
            self._then = None

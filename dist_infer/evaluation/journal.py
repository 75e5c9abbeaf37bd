"""The journal of finished requests: what a run that was cut short need not compute again.

A directory of part files, JSON lines, one result a line. Every writer has a part of its own, which is never
opened for writing again: copies of a job that are alive at once cannot spoil each other's lines, and a line
that was torn (by a kill, a power cut, a full disk) harms no other. Each line ends with its result's key and
a checksum of all that comes before the checksum, so a line is whole or it is not there.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dist_infer.engine.request import Result

SYNC_S = 1.0  # a line waits at most this long for its fsync to begin
OPEN_FILES = 64  # parts that are kept open for reading
_ENCODER = json.JSONEncoder(default=vars)  # far faster than a copy by `Result.to_json`
_KEY = b', "key": '
_CHECKSUM = b', "crc32": "%08x"}'
_OFFSET_BITS = 44


def encode(result: Result) -> bytes:
    """The journal's line for `result`."""
    data = {name: value for name, value in vars(result).items() if name != "key"}
    body = _ENCODER.encode(data)[:-1].encode() + _KEY + json.dumps(result.key).encode()
    return body + _CHECKSUM % zlib.crc32(body) + b"\n"


def _key_of(line: bytes) -> bytes | None:
    """The key, as JSON, that a line without its line break is written for; None when the line is not whole."""
    body = line[: -len(_CHECKSUM % 0)]
    key = body.rpartition(_KEY)[2]  # inside a JSON string its quotes would be escaped
    return key if line == body + _CHECKSUM % zlib.crc32(body) else None


@dataclass
class _Part:
    """One writer's file, as far as it was read."""

    path: Path
    read: int = 0
    said: bool = False  # whether the user knows that lines of it are torn


class Journal:
    """What all writers of a directory have finished. Of two results for a key the one in the first part, by name, counts.

    In memory are keys and places only; results are read when they are asked for.

    Args:
        directory: Where the parts are, or will be.
        say: Prints a line for the user.

    Raises:
        OSError: `directory` is there and cannot be read.
    """

    def __init__(self, directory: Path, say: Callable[[str], None] | None = None) -> None:
        self.directory = directory
        self._say = say or (lambda line: None)
        self._parts: list[_Part] = []
        self._places: dict[bytes, int] = {}  # key -> number of its part and offset there, packed
        self._files: dict[int, BinaryIO] = {}
        self.refresh()

    def __contains__(self, key: str) -> bool:
        """Whether the request of that key is finished."""
        return json.dumps(key).encode() in self._places

    def find(self, key: str) -> Result | None:
        """The result of the request of that key, if it is finished."""
        place = self._places.get(json.dumps(key).encode())
        return None if place is None else Result.from_json(json.loads(self._line(place)))

    def refresh(self) -> None:
        """Read what the parts have gained, and parts that are new."""
        known = {part.path for part in self._parts}
        found = self.directory.glob("*.jsonl") if self.directory.exists() else []
        self._parts += [_Part(path) for path in sorted(found) if path not in known]
        for number, part in enumerate(self._parts):
            if part.path.stat().st_size > part.read:
                self._read(number, part)

    def writer(self, name: str) -> JournalWriter:
        """A new part; `name` should say who writes it.

        Raises:
            OSError: It cannot be made.
        """
        return JournalWriter(self.directory, name)

    def merge(self, path: Path) -> None:
        """Write a file with every finished request once, in the parts' order, as the parts are now; never half of it.

        Args:
            path: Outside of the journal's own directory.

        Raises:
            OSError: It cannot be written.
        """
        assert path.parent.resolve() != self.directory.resolve(), "a merged file is not a part"
        now = Journal(self.directory)
        whole = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.new")
        try:
            with open(whole, "wb") as file:
                file.writelines(now._line(place) for place in sorted(now._places.values()))
                file.flush()
                os.fsync(file.fileno())
            os.replace(whole, path)
        except OSError as error:
            whole.unlink(missing_ok=True)
            raise OSError(error.errno, f"{error.strerror}; the finished requests are still in {self.directory}", str(path)) from error

    def _read(self, number: int, part: _Part) -> None:
        """Index the lines of a part that were not read yet."""
        with open(part.path, "rb") as file:
            file.seek(part.read)
            for line in file:
                whole = line.endswith(b"\n")
                key = _key_of(line[:-1]) if whole else None
                if key is not None:
                    self._remember(key, number, part.read)
                elif line != b"\n" and not part.said:
                    part.said = True
                    self._say(f"{part.path}: a line that was not written to its end is left out")
                if whole:  # else its writer may still be at it
                    part.read += len(line)

    def _remember(self, key: bytes, number: int, offset: int) -> None:
        old = self._places.get(key)
        if old is None or self._parts[number].path < self._parts[old >> _OFFSET_BITS].path:
            self._places[key] = number << _OFFSET_BITS | offset

    def _line(self, place: int) -> bytes:
        number, offset = place >> _OFFSET_BITS, place & (1 << _OFFSET_BITS) - 1
        file = self._files.get(number)
        if file is None:
            if len(self._files) == OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            file = self._files[number] = open(self._parts[number].path, "rb")  # noqa: SIM115
        file.seek(offset)
        return file.readline()


class JournalWriter:
    """Appends results to a part file of its own.

    What `append` was given has been handed to the system when it returns, and is on the disk a second or two later.

    Args:
        directory: The journal's; made if it is not there.
        name: Of the part; if that is taken, a number is added.

    Raises:
        OSError: The part cannot be made.
    """

    def __init__(self, directory: Path, name: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path, self._file = _create(directory, name)
        self._torn = False  # whether the file ends in the middle of a line
        self._sync_error: OSError | None = None
        self._dirty, self._closing = threading.Event(), threading.Event()
        self._syncer = threading.Thread(target=self._sync, daemon=True, name="journal")
        self._syncer.start()

    def append(self, results: Iterable[Result]) -> None:
        """Write `results`, each of which has a key; those with an error are left out, for they are not done.

        Raises:
            OSError: The disk is full, or another reason that something could not be written.
        """
        self._check_sync()
        data = b"".join(encode(result) for result in results if result.error is None)
        if not data:
            return
        left = memoryview(b"\n" + data if self._torn else data)
        self._torn = True
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError as error:
            raise self._explained(error) from error
        finally:
            self._dirty.set()
        self._torn = False

    def close(self) -> None:
        """Bring everything to the disk; nothing can be appended any more.

        Raises:
            OSError: The disk did not take it.
        """
        self._closing.set()
        self._dirty.set()
        self._syncer.join()
        self._sync_now()
        os.close(self._file)
        self._check_sync()

    def _sync(self) -> None:
        """Until it is closed: fsync soon after something was written."""
        while not self._closing.is_set():
            self._dirty.wait()
            self._closing.wait(SYNC_S)
            self._dirty.clear()
            self._sync_now()

    def _sync_now(self) -> None:
        try:
            os.fsync(self._file)
        except OSError as error:  # said once only: the system forgets what it could not write
            self._sync_error = self._sync_error or error

    def _check_sync(self) -> None:
        if self._sync_error is not None:
            raise self._explained(self._sync_error) from self._sync_error

    def _explained(self, error: OSError) -> OSError:
        why = f"{error.strerror}; what is in the journal stays good: see to the disk and run this again"
        return OSError(error.errno, why, str(self.path))


def _create(directory: Path, name: str) -> tuple[Path, int]:
    """A file that was not there before, open for appending; its name will outlive a power cut."""
    for path in _names(directory, name):
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            continue
        entries = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(entries)
        finally:
            os.close(entries)
        return path, file
    raise AssertionError("names do not end")


def _names(directory: Path, name: str) -> Iterator[Path]:
    yield directory / f"{name}.jsonl"
    yield from (directory / f"{name}-{number}.jsonl" for number in itertools.count(2))

"""The journal: whatever interrupts its writers, what was written whole is there, once."""

from __future__ import annotations

import errno
import json
import os
import time
import tracemalloc
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_infer.engine.request import Output, Result, Score, TokenLogprob, Usage
from dist_infer.evaluation import journal as journal_module
from dist_infer.evaluation.journal import Journal, JournalWriter, encode


def scored(key: str, logprob: float = -1.5) -> Result:
    return Result(f"id of {key}", 3, score=Score(logprob, True, [logprob, 0.0]), usage=Usage(9, 0, 4), key=key)


def generated(key: str, text: str) -> Result:
    output = Output(text, [5, 6], "stop", [TokenLogprob(5, -0.1, {5: -0.1, 7: -2.5}), TokenLogprob(6, float("-inf"))])
    return Result("id", 0, [output, Output(None, [], "length")], usage=Usage(2, 2), seed=2**62, key=key)


def write(directory: Path, name: str, results: list[Result]) -> Path:
    writer = Journal(directory).writer(name)
    writer.append(results)
    writer.close()
    return writer.path


def merged(directory: Path) -> list[Result]:
    path = directory.parent / f"{directory.name} merged"
    Journal(directory).merge(path)
    return [Result.from_json(json.loads(line)) for line in path.read_text().splitlines()]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


TEXTS = ["plain", "", 'quotes ", "key": "other", "crc32": "00000000"}', "line\nbreaks\r\n\u2028", "\udc80 \0 ü 字", "\\"]


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    results = [generated(f"g{index}", text) for index, text in enumerate(TEXTS)]
    results += [scored("s"), scored('odd ", "key": "s"', -2.5), scored("ü\n")]
    write(tmp_path / "journal", "part", results)
    found = Journal(tmp_path / "journal")
    assert [found.find(result.key) for result in results] == results
    assert all(result.key in found for result in results)
    assert found.find("none") is None and "none" not in found
    assert merged(tmp_path / "journal") == results


def test_a_line_is_the_results_json_and_a_checksum() -> None:
    for result in (scored("s"), generated("g", "text")):
        line = json.loads(encode(result))
        del line["crc32"]
        assert line == json.loads(json.dumps(result.to_json()))


def test_what_failed_is_not_done(tmp_path: Path) -> None:
    write(tmp_path, "part", [Result("id", 0, error="too long", key="a"), scored("b")])
    assert "a" not in Journal(tmp_path) and "b" in Journal(tmp_path)


def test_results_can_be_read_as_soon_as_they_are_appended(tmp_path: Path) -> None:
    found = Journal(tmp_path / "not there yet")
    writer = found.writer("part")
    for key in "abc":
        writer.append([scored(key)])
        assert key not in found
        found.refresh()
        assert found.find(key) == scored(key)
    writer.close()


def test_writers_of_one_name_have_files_of_their_own(tmp_path: Path) -> None:
    writers = [Journal(tmp_path).writer("rank_0") for _ in range(3)]
    assert [writer.path.name for writer in writers] == ["rank_0.jsonl", "rank_0-2.jsonl", "rank_0-3.jsonl"]
    for key, writer in zip("abcabc", 2 * writers, strict=True):
        writer.append([scored(key)])
    for writer in writers:
        writer.close()
    assert sorted(result.key for result in merged(tmp_path)) == ["a", "b", "c"]


def test_the_first_part_by_name_wins_whenever_it_is_read(tmp_path: Path) -> None:
    write(tmp_path, "b", [scored("x", -1.0), scored("y", -1.0)])
    early = Journal(tmp_path)
    write(tmp_path, "a", [scored("x", -2.0)])
    write(tmp_path, "c", [scored("x", -3.0), scored("y", -3.0)])
    early.refresh()
    for found in (early, Journal(tmp_path)):
        assert [found.find(key) for key in "xy"] == [scored("x", -2.0), scored("y", -1.0)]
    assert merged(tmp_path) == [scored("x", -2.0), scored("y", -1.0)]


def test_a_part_cut_anywhere_keeps_its_whole_lines(tmp_path: Path) -> None:
    results, ends, content, path = three_lines(tmp_path)
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        whole = sum(end <= cut for end in ends)
        said: list[str] = []
        found = Journal(tmp_path, said.append)
        assert [found.find(key) for key in "abc"] == results[:whole] + [None] * (3 - whole)
        assert len(said) == (cut not in (0, *ends))


def test_a_part_with_a_hole_keeps_its_other_lines(tmp_path: Path) -> None:
    """As a power cut may leave it."""
    results, ends, content, path = three_lines(tmp_path)
    for hole in range(0, len(content), 5):
        path.write_bytes(content[:hole] + bytes(8) + content[hole + 8 :])
        found = Journal(tmp_path)
        for key, result, start, end in zip("abc", results, (0, *ends), ends, strict=False):
            broken = hole < end and start - 1 < hole + 8  # the break before a line is part of it
            assert found.find(key) == (None if broken else result)


def three_lines(directory: Path) -> tuple[list[Result], list[int], bytes, Path]:
    """Results, where their lines end, and the part that has them."""
    results = [scored("a"), generated("b", TEXTS[2]), generated("c", TEXTS[4])]
    ends = list(accumulate(len(encode(result)) for result in results))
    path = write(directory, "old", results)
    return results, ends, path.read_bytes(), path


def test_a_torn_line_may_still_be_completed(tmp_path: Path) -> None:
    """By a copy that is alive: the network shows the beginning of what it writes."""
    line = encode(scored("a"))
    said: list[str] = []
    with open(tmp_path / "part.jsonl", "wb", buffering=0) as file:
        file.write(line[:30])
        found = Journal(tmp_path, said.append)
        file.write(line[30:] + encode(scored("b"))[:5])
        assert "a" not in found
        found.refresh()
        assert found.find("a") == scored("a")
    found.refresh()
    assert said == [f"{tmp_path / 'part.jsonl'}: a line that was not written to its end is left out"]


Event = tuple[str, int, int]


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(["write", "kill", "tear", "refresh"]), st.integers(0, 2), st.integers(0, 400)), max_size=30))
def test_writers_come_and_go(events: list[Event]) -> None:
    """Copies of a job, each computing the next key it does not know of, killed and torn at any byte: no key is lost or doubled."""
    with TemporaryDirectory() as directory:
        root = Path(directory) / "journal"
        copies: list[tuple[Journal, JournalWriter] | None] = [None] * 3
        kept: set[str] = set()
        for number, (what, who, amount) in enumerate(events):
            copy = copies[who]
            if copy is None:
                found = Journal(root)
                assert all(key in found for key in kept)
                copy = copies[who] = found, found.writer(f"copy{amount % 2}")
            found, writer = copy
            if what == "write":
                keys = [key for key in map(str, range(amount % 7)) if key not in found]
                writer.append([scored(key, -number) for key in keys])
                kept |= set(keys)
            elif what == "refresh":
                found.refresh()
                assert all(key in found for key in kept)
            else:
                if what == "tear":
                    writer.append([generated("torn", TEXTS[4])])
                    size, line = writer.path.stat().st_size, len(encode(generated("torn", TEXTS[4])))
                    os.truncate(writer.path, size - 1 - amount % line)
                writer.close()
                copies[who] = None
        for copy in copies:
            if copy is not None:
                copy[1].close()
        found, results = Journal(root), merged(root)
        assert sorted(result.key for result in results) == sorted(kept)
        assert all(found.find(result.key) == result for result in results)


def full(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Let `os.write` take `room` bytes and then say that the disk is full."""
    left, real = room, os.write

    def write_some(file: int, data: Any) -> int:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(file, data[:left])
        left -= written
        return written

    monkeypatch.setattr(journal_module.os, "write", write_some)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = len(encode(scored("a"))), len(encode(scored("b")))
    for room in {0, 1, *range(2, first - 1, 20), first - 1, first, first + 1, first + second - 2}:  # bytes
        directory = tmp_path / str(room)
        writer = Journal(directory).writer("part")
        with monkeypatch.context() as patch:
            full(patch, room)
            with pytest.raises(OSError, match="No space left on device; what is in the journal stays good") as error:
                writer.append([scored("a"), scored("b")])
        assert str(writer.path) in str(error.value) and "\n" not in str(error.value)
        found = Journal(directory)
        assert ("a" in found) == (room >= first) and "b" not in found
        writer.append([scored("c")])  # there is room again
        writer.close()
        assert [result.key for result in merged(directory)] == ["a", "c"][room < first - 1 :]  # of "a" only the line's break may be missing


def test_a_disk_that_loses_what_it_took_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Journal(tmp_path).writer("part")

    def broken(file: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(journal_module.os, "fsync", broken)
        writer.append([scored("a")])
        until(lambda: writer._sync_error is not None)
    for late in (lambda: writer.append([scored("b")]), writer.close):
        with pytest.raises(OSError, match="Input/output error"):
            late()


def test_everything_is_synced_soon_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Journal(tmp_path).writer("part")
    synced, real = [], os.fsync

    def sync(file: int) -> None:
        synced.append(os.fstat(file).st_size)
        real(file)

    monkeypatch.setattr(journal_module.os, "fsync", sync)
    for key in "ab":
        writer.append([scored(key)])
        size = writer.path.stat().st_size
        until(lambda size=size: size in synced)  # though nothing more comes
    monkeypatch.setattr(journal_module, "SYNC_S", 1000.0)
    writer.append([scored("c")])
    writer.close()
    assert synced[-1] == writer.path.stat().st_size > size


def test_a_merge_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "journal", "part", [scored("a"), scored("b"), scored("a", -9.0)])
    path = tmp_path / "merged.jsonl"
    path.write_text("before")

    def broken(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(journal_module.os, "fsync", broken)
        with pytest.raises(OSError, match="No space left on device; the finished requests are still in"):
            Journal(tmp_path / "journal").merge(path)
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 2
    Journal(tmp_path / "journal").merge(path)
    assert path.read_bytes() == encode(scored("a")) + encode(scored("b"))


def test_many_parts_and_lines_take_little_memory(tmp_path: Path) -> None:
    keys = [f"{index:032x}" for index in range(10_000)]
    for part in range(100):
        write(tmp_path, f"part{part:03}", [scored(key) for key in keys[part::100]])
    tracemalloc.start()
    found = Journal(tmp_path)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 300 * len(keys)
    assert all(found.find(key) == scored(key) for key in keys[:300])

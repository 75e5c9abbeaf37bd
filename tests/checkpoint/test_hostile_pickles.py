"""Nothing in a pickle is executed, and none takes more memory than its file."""

from __future__ import annotations

import functools
import importlib
import os
import pickle
import struct
import subprocess
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata

from tests.checkpoint.damage import NAME, change, move, refusal


class Call:
    """Pickled, it calls `function` when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def hostile(mark: Path) -> dict[str, tuple[Any, str]]:
    """What would touch `mark` if it were run, and what it is refused for."""
    touch = f"import pathlib; pathlib.Path({str(mark)!r}).touch()"
    return {
        "system": (Call(os.system, f"touch {mark}"), "system, which"),
        "eval": (Call(eval, f"__import__('pathlib').Path({str(mark)!r}).touch()"), "eval, which"),
        "exec": (Call(exec, touch), "exec, which"),
        "method": (Call(Path.touch, mark), "getattr, which"),
        "nested": ([{"a": Call(OrderedDict, Call(os.system, f"touch {mark}"))}], "system, which"),
        "popen": (Call(subprocess.Popen, ["touch", str(mark)]), "Popen, which"),
        "load": (Call(torch.load, str(mark)), "load, which"),
        "partial": (Call(functools.partial, os.system, f"touch {mark}"), "partial, which"),
        "import": (Call(importlib.import_module, "antigravity"), "import_module, which"),
    }


@pytest.mark.parametrize("case", list(hostile(Path("x"))))
def test_nothing_is_run(run: Path, tmp_path: Path, case: str) -> None:
    content, part = hostile(tmp_path / "ran")[case]
    if case != "method":  # getattr has a harmless stand-in in metadata
        change(run, lambda metadata: metadata.planner_data.update(bomb=content))
        assert part in refusal(run) and "refused" in refusal(run)
    (run / ".metadata").write_bytes(pickle.dumps(content))
    assert "not readable as DCP metadata" in refusal(run) or "where DCP metadata is expected" in refusal(run)
    for name in ("pytorch_model.bin", "lit_model.pth"):
        place = tmp_path / name.partition(".")[0]
        place.mkdir()
        torch.save({"weight": torch.ones(2), "bomb": content}, place / name)
        message = refusal(place)
        assert part in message and "refused" in message and str(place / name) in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("case", list(hostile(Path("x"))))
def test_nothing_in_an_item_is_run(tmp_path: Path, run: Path, case: str) -> None:
    content, part = hostile(tmp_path / "ran")[case]
    torch.save([content, torch.ones(5000)], run / "bomb.distcp")
    change(run, move(NAME, relative_path="bomb.distcp", offset=0, length=(run / "bomb.distcp").stat().st_size))
    message = refusal(run)
    assert part in message and "refused" in message and str(run / "bomb.distcp") in message
    assert not (tmp_path / "ran").exists()


def doubled(times: int) -> bytes:
    """Pushes a tuple that holds itself twice, `times` deep."""
    return b")" + b"".join(b"r" + struct.pack("<I", at) + (b"j" + struct.pack("<I", at)) + b"\x86" for at in range(times))


LONG = struct.pack("<Q", 10**10)
BOMBS = {
    "memo": b"}r\xff\xff\xff\xff.",
    "get": b"}j\xff\xff\xff\xff.",
    "text": b"X\xff\xff\xff\xffab.",
    "text8": b"\x8d" + LONG + b"ab.",
    "bytes": b"B\xff\xff\xff\x7fab.",
    "bytes8": b"\x8e" + LONG + b"ab.",
    "bytearray8": b"\x96" + LONG + b"ab.",
    "frame": b"\x95" + LONG + b"ab.",
    "integer": b"\x8a\xff" + b"\1" * 255 + b".",
    "long integer": b"\x8b\xff\xff\xff\x7f" + b"\1" * 255 + b".",
    "digits": b"I" + b"9" * 100_000 + b"\n.",
    "key of tuples": b"}" + doubled(60) + b"Ns.",
    "set of tuples": b"\x8f(" + doubled(60) + b"\x90.",
    "value of tuples": b"}X\1\0\0\0a" + doubled(60) + b"s.",
    "marks": b"(" * 200_000,
    "lists": b"]" + b"]a" * 5 + b"a" * 10,
    "deep": b"]" * 100_000 + b"a" * 99_999 + b".",
    "empty": b"",
    "no end": b"}" * 1000,
    "duplicates": b"}" + b"2" * 1000 + b".",
    "extension": b"\x82\1.",
    "instance": b"(ios\nsystem\n.",
    "old name": b"cos\nsystem\n(S'true'\ntR.",
    "name of nothing": b"]]\x93.",
    "call of a number": b"K\1)R.",
    "size of a size": b"ctorch\nSize\n(" + b"K\1" * 5000 + b"tR.",
    "many unknown": b"".join(b"ctorch.distributed.checkpoint.metadata\nA%d\n" % number for number in range(1000)) + b".",
    "name of two lines": b"\x8c\2os\x8c\7sys\ntem\x93.",
}  # fmt: skip


def peak(read: Callable[[], object]) -> int:
    """The most bytes of Python objects that were alive at once while `read` ran."""
    tracemalloc.start()
    try:
        read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("case", list(BOMBS))
def test_bombs_in_pickles(run: Path, tmp_path: Path, case: str) -> None:
    (run / ".metadata").write_bytes(b"\x80\4" + BOMBS[case])

    def read() -> None:
        assert ".metadata" in refusal(run)

    assert peak(read) < 20 << 20
    file = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\2" + BOMBS[case])
    if case != "value of tuples":  # harmless: nobody looks at it

        def read_file() -> None:
            assert str(file) in refusal(file)

        assert peak(read_file) < 20 << 20


def test_tables_that_say_one_thing_many_times(run: Path) -> None:
    def edit(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata[NAME]
        entry.chunks = [ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((0, 4)))] * 2000
        metadata.state_dict_metadata.update({f"w{number}": entry for number in range(2000)})

    change(run, edit)
    assert "more chunks than a file of its size can hold" in refusal(run)


def test_dicts_that_hold_each_other(tmp_path: Path) -> None:
    inner: dict[str, Any] = {}
    for _ in range(40):
        inner = {"a": inner, "b": inner}
    torch.save(inner, tmp_path / "pytorch_model.bin")
    assert "nests or repeats" in refusal(tmp_path)
    inner["self"] = inner
    torch.save(inner, tmp_path / "pytorch_model.bin")
    assert "nests or repeats" in refusal(tmp_path)

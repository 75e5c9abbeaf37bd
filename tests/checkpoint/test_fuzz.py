"""No bytes crash a parser, make it hang, or let it take more memory than files of their size deserve."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_infer.checkpoint.locate import locate
from dist_infer.checkpoint.sources import open_source
from dist_infer.checkpoint.sources.archive import find_elements
from dist_infer.checkpoint.sources.codec import verify_crc
from dist_infer.checkpoint.sources.unpickle import Record, unpickle

FIXTURES = Path(__file__).parents[1] / "data" / "fixtures"
MEMORY = 8 << 20  # bytes; the files are of some kilobytes
fuzz = settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

NUMBERS = [0, 1, 255, 1 << 16, (1 << 31) - 1, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]
EDITS = st.tuples(
    st.sampled_from(["flip", "number", "drop", "repeat", "cut", "swap"]),
    st.floats(0, 1, exclude_max=True),  # where, as a part of the whole
    st.floats(0, 1, exclude_max=True),
    st.one_of(st.integers(0, 255), st.sampled_from(NUMBERS)),
)


def mutated(data: bytes, edits: list[tuple[str, float, float, int]]) -> bytes:
    """`data` with some of its bytes changed, gone, or elsewhere."""
    for kind, place, other, value in edits:
        at, to = int(place * len(data)), int(other * len(data))
        low, high = min(at, to), min(max(at, to), min(at, to) + 64)
        if kind == "flip":
            data = data[:at] + bytes([value & 255]) + data[at + 1 :]
        elif kind == "number":
            width = 8 if value > 0xFFFFFFFF else 4
            data = data[:at] + value.to_bytes(width, "little") + data[at + width :]
        elif kind == "drop":
            data = data[:low] + data[high:]
        elif kind == "repeat":
            data = data[:high] + data[low:high] * (1 + value % 5) + data[high:]
        elif kind == "cut":
            data = data[:at]
        else:
            data = data[:at] + data[low:high] + data[at + high - low :]
    return data


def survives(read: Callable[[], object]) -> None:
    """Check that `read` returns or refuses in one line, in little memory."""
    tracemalloc.start()
    try:
        read()
    except (ValueError, FileNotFoundError) as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert most < MEMORY, most


def open_all(path: Path) -> None:
    """Open the checkpoint at `path` and find every weight's bytes, within its files."""
    source = open_source(locate(str(path)).path)
    for entry in source.index().values():
        for chunk in entry.chunks:
            with (source.root / chunk.file).open("rb") as file:
                offset, length = chunk.offset, chunk.length
                if chunk.codec == "torch_save":
                    offset = find_elements(file.fileno(), chunk, entry.dtype)[0]
                    length = entry.item_size * entry.elements if len(entry.chunks) == 1 else 0
                assert 0 <= offset <= offset + length <= os.fstat(file.fileno()).st_size
            verify_crc(source.root, chunk, entry.dtype)


def checkpoints(root: Path) -> dict[str, tuple[Path, str]]:
    """A small checkpoint of each format, and the file in it that is to be changed."""
    for form in ("ranks", "safetensors", "pieces"):
        shutil.copytree(FIXTURES / "dcp_forms" / form, root / form)
    weights = {"a": torch.ones(5, 4), "deep": {"b": torch.nn.Parameter(torch.ones(3).bfloat16())}, "c": torch.tensor(3)}
    for name in ("bin", "sharded"):
        (root / name).mkdir()
    torch.save(weights, root / "bin/lit_model.pth")
    torch.save({"a": torch.ones(2)}, root / "sharded/one.bin")
    (root / "sharded/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "one.bin"}}))
    shutil.copytree(FIXTURES / "fast_llm_llama", root / "fast_llm", ignore=shutil.ignore_patterns("reference*"))
    (root / "run/step_1").mkdir(parents=True)
    torch.save(weights, root / "run/step_1/lit_model.pth")
    (root / "run/latest").write_text("step_1")
    return {
        "a rank's metadata": (root / "ranks", "__1.metadata"),
        "items": (root / "ranks", "__1_0.distcp"),
        "metadata": (root / "safetensors", ".metadata"),
        "safetensors items": (root / "safetensors", "__1_0.distcp"),
        "safetensors": (root / "pieces", "shard-00001-model-00001-of-00001.safetensors"),
        "archive": (root / "bin", "lit_model.pth"),
        "index": (root / "sharded", "pytorch_model.bin.index.json"),
        "yaml": (root / "fast_llm", "metadata.yaml"),
        "latest": (root / "run", "latest"),
    }


CASES = ["a rank's metadata", "items", "metadata", "safetensors items", "safetensors", "archive", "index", "yaml", "latest"]


@pytest.fixture(scope="module")
def small() -> Iterator[dict[str, tuple[Path, str]]]:
    root = Path(mkdtemp())
    found = checkpoints(root)
    for path, _ in found.values():
        open_all(path)
    yield found
    shutil.rmtree(root)


@pytest.mark.parametrize("case", CASES)
def test_changed_files(small: dict[str, tuple[Path, str]], case: str) -> None:
    path, name = small[case]
    whole = (path / name).read_bytes()

    @fuzz
    @given(st.lists(EDITS, min_size=1, max_size=4))
    def check(edits: list[tuple[str, float, float, int]]) -> None:
        (path / name).write_bytes(mutated(whole, edits))
        survives(lambda: open_all(path))

    try:
        check()
    finally:
        (path / name).write_bytes(whole)


@fuzz
@given(st.lists(EDITS, min_size=1, max_size=3))
def test_changed_pickles_in_a_whole_archive(small: dict[str, tuple[Path, str]], edits: list[tuple[str, float, float, int]]) -> None:
    path, name = small["archive"]
    whole = (path / name).read_bytes()
    with zipfile.ZipFile(path / name) as archive:
        records = {record: archive.read(record) for record in archive.namelist()}
    try:
        with zipfile.ZipFile(path / name, "w") as archive:
            for record, data in records.items():
                archive.writestr(record, mutated(data, edits) if record.endswith("data.pkl") else data)
        survives(lambda: open_all(path))
    finally:
        (path / name).write_bytes(whole)


SIZED = st.tuples(
    st.sampled_from([(b"X", 4), (b"B", 4), (b"\x8c", 1), (b"C", 1), (b"\x8d", 8), (b"\x8e", 8), (b"\x96", 8), (b"\x8a", 1)]),
    st.binary(max_size=9),
)
INDEXED = st.tuples(st.sampled_from([(b"q", 1), (b"h", 1), (b"r", 4), (b"j", 4), (b"K", 1), (b"M", 2), (b"J", 4)]), st.integers(0, 6))
WHOLE = [
    *(bytes([opcode]) for opcode in range(256)),
    b"ctorch\nSize\n",
    b"cos\nsystem\n",
    b"ccollections\nOrderedDict\n",
    b")R",
    b")\x81",
    b"h\0h\0\x86q\0",
]
OPCODES = st.one_of(
    SIZED.map(lambda drawn: drawn[0][0] + len(drawn[1]).to_bytes(drawn[0][1], "little") + drawn[1]),
    INDEXED.map(lambda drawn: drawn[0][0] + drawn[1].to_bytes(drawn[0][1], "little")),
    st.sampled_from(WHOLE),
    st.sampled_from([b"]", b"}", b"(", b")", b"a", b"e", b"s", b"u", b"t", b"\x86", b"\x94", b"R", b"b", b"0", b"K\1", b"Q"]),
)  # fmt: skip


def find(module: str, name: str) -> object:
    table = {"system": Record, "Size": tuple, "OrderedDict": dict}
    if name not in table:
        raise ValueError(f"{name!r} is refused")
    return table[name]


@settings(fuzz, max_examples=1500)
@given(st.lists(OPCODES, max_size=40).map(b"".join))
def test_made_up_pickles(data: bytes) -> None:
    survives(lambda: unpickle(data + b".", find, lambda identity: identity))


PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(1 << 100), 1 << 40), st.floats(), st.text(max_size=20), st.tuples(st.integers(0, 9))),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4), st.tuples(inner, inner)),
    max_leaves=30,
)


@fuzz
@given(PLAIN, st.integers(2, 5))
def test_plain_data_is_read_as_pickle_reads_it(value: object, protocol: int) -> None:
    def read() -> object:
        return unpickle(pickle.dumps(value, protocol), find)

    assert repr(read()) == repr(value)


FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F99", None, 3, ["F32"]]),
        "shape": st.one_of(st.none(), st.lists(st.one_of(st.integers(-1, 5), st.sampled_from(NUMBERS), st.just("3")), max_size=10)),
        "data_offsets": st.one_of(st.none(), st.lists(st.one_of(st.integers(-8, 64), st.sampled_from(NUMBERS), st.floats()), max_size=3)),
    },
)


@fuzz
@given(
    st.dictionaries(st.text(max_size=8), st.one_of(FIELDS, st.integers(), st.none()), max_size=4),
    st.one_of(st.none(), st.text(max_size=20), st.fixed_dictionaries({"DCP_SHARDING_INFO": st.text(max_size=20)})),
    st.one_of(st.none(), st.sampled_from(NUMBERS)),
)
def test_made_up_safetensors(small: dict[str, tuple[Path, str]], header: dict[str, object], about: object, length: int | None) -> None:
    folder = small["safetensors"][0].parent / "made_up"
    folder.mkdir(exist_ok=True)
    text = json.dumps({**header, "__metadata__": about}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(64))
    survives(lambda: open_all(folder))


@fuzz
@given(
    st.dictionaries(
        st.text(max_size=8), st.one_of(st.text(max_size=12), st.integers(), st.none(), st.lists(st.text(max_size=3))), max_size=4
    )
)
def test_made_up_indexes(small: dict[str, tuple[Path, str]], weight_map: dict[str, object]) -> None:
    path, name = small["index"]
    whole = (path / name).read_bytes()
    try:
        (path / name).write_text(json.dumps({"weight_map": weight_map}))
        survives(lambda: open_all(path))
    finally:
        (path / name).write_bytes(whole)


@pytest.mark.parametrize("name", [".metadata", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pp0/.metadata"])
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    place = tmp_path_factory.mktemp("any")
    (place / name).parent.mkdir(exist_ok=True)

    @settings(fuzz, max_examples=100)
    @given(st.binary(max_size=200), st.sampled_from([b"", b"PK\3\4", b"\x80\4", b"{", struct.pack("<Q", 8)]))
    def check(data: bytes, start: bytes) -> None:
        (place / name).write_bytes(start + data)
        survives(lambda: open_all(place))

    check()

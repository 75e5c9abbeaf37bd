"""Compiled CPU kernels: `native.cpp`, built once for this machine where it has a C++ compiler.

Each replaces a few eager operations of a layer by one pass over memory. They are for plain float32 and
bfloat16 tensors; modules keep their eager operations beside the call, for all other cases.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from dist_infer.model import huge_pages
from dist_infer.model.attention_plan import SpanTable

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = "-O3 -march=native -std=c++17 -fopenmp -fPIC -w"
NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16"}

_POINTER, _INT, _FLOAT, _BOOL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_bool
_ARGUMENTS = {
    "add_rms_norm": [_POINTER] * 4 + [_INT] * 2 + [_FLOAT] * 2,
    "rotate_and_cache": [_POINTER] * 5 + [_FLOAT] * 2 + [_POINTER] * 3 + [_INT] * 6,
    "paged_attention": [_POINTER] * 8 + [_INT] * 8 + [_FLOAT] * 2,
    "silu_and_multiply": [_POINTER] * 2 + [_INT] * 2,
}
_FUNCTIONS = (
    ("read_runs", [_INT, _POINTER] + [_INT] * 4, _INT),
    ("best_of_rows_float", [_POINTER] * 4 + [_INT] * 2, None),
    ("greatest_float", [_POINTER] * 2 + [_INT] * 3, None),
    ("best_few_float", [_POINTER] * 3 + [_INT] * 3, None),
    ("gumbel_noise", [_POINTER] * 3 + [_INT] * 3, None),
    ("draw_rows", [_POINTER, _INT] + [_POINTER] * 3 + [_INT] * 4 + [_FLOAT], None),
)
_LANES, _TILE = 16, 12  # WIDTH and TILE of native.cpp
_NEAR = 1 << 19  # bytes of inputs that stay in a core's own cache while a packed weight passes by
_PRODUCTS = {
    "pack_matrix": [_POINTER] * 2 + [_INT] * 2 + [_BOOL],
    "pack_in_place": [_POINTER] + [_INT] * 2 + [_BOOL],
    "multiply": [_POINTER] * 4 + [_INT] * 4 + [_BOOL],
    "logits": [_POINTER] * 3 + [_FLOAT] * 2 + [_POINTER] * 2 + [_INT] * 4,
    "run_halves": [_POINTER] * 2 + [_BOOL] + [_INT] * 2,
}


class Kernels:
    """The kernels of one element type.

    Attributes:
        can_multiply: Whether there are matrix products among them.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.can_multiply = hasattr(library, f"multiply_{NAMES[dtype]}")
        for name, arguments in (_ARGUMENTS | _PRODUCTS if self.can_multiply else _ARGUMENTS).items():
            function = getattr(library, f"{name}_{NAMES[dtype]}")
            function.argtypes, function.restype = arguments, _INT if name == "run_halves" else None
            setattr(self, f"_{name}", function)

    _add_rms_norm: ctypes._NamedFuncPointer
    _rotate_and_cache: ctypes._NamedFuncPointer
    _paged_attention: ctypes._NamedFuncPointer
    _silu_and_multiply: ctypes._NamedFuncPointer
    _pack_matrix: ctypes._NamedFuncPointer
    _pack_in_place: ctypes._NamedFuncPointer
    _multiply: ctypes._NamedFuncPointer
    _logits: ctypes._NamedFuncPointer
    _run_halves: ctypes._NamedFuncPointer

    def add_rms_norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
        """Add `delta` to `x` [rows, size] in place, and normalize the sum; `offset` is added to the weight."""
        out = torch.empty_like(x)
        self._add_rms_norm(address(x), address(delta), address(weight), address(out), x.shape[0], x.shape[1], eps, offset)
        return out

    def rotate_and_cache(
        self,
        qkv: Tensor,
        heads: int,
        cos: Tensor,
        sin: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        offset: float,
        slots: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> None:
        """Normalize queries and keys where there are weights, rotate them, and write keys and values to the cache.

        Args:
            qkv: [tokens, heads + 2 * kv_heads, head_dim]; the queries are overwritten.
            heads: How many of them are queries.
            cos: [tokens, 1, rotary_dim], as `rotate` wants it; `sin` likewise.
            q_weight: [head_dim] of the query norm; `k_weight` of the key norm.
            eps: Epsilon of both norms.
            offset: What is added to their weights.
            slots: [tokens] int64, block * block_size + offset.
            keys: [blocks, kv_heads, block_size, head_dim], the layer's pool; `values` likewise.
        """
        tokens, all_heads, head_dim = qkv.shape
        pointers = [address(tensor) for tensor in (qkv, cos, sin, q_weight, k_weight)]
        pools = [address(tensor) for tensor in (slots, keys, values)]
        kv_heads = (all_heads - heads) // 2
        self._rotate_and_cache(*pointers, eps, offset, *pools, tokens, heads, kv_heads, head_dim, cos.shape[-1], keys.shape[2])

    def paged_attention(
        self,
        q: Tensor,
        out: Tensor,
        keys: Tensor,
        values: Tensor,
        spans: SpanTable,
        groups: Tensor,
        window: int | None,
        scale: float,
        softcap: float | None = None,
    ) -> None:
        """Attention of all spans.

        Args:
            q: [tokens, heads, head_dim], contiguous but for the first dim.
            out: The same shape, written.
            keys: [blocks, kv_heads, block_size, head_dim], the layer's pool; `values` likewise.
            spans: Which tokens read which blocks.
            groups: [kv_heads + 1] int32, first query head on each KV head, and the end.
            window: The layer's sliding window.
            scale: Factor on the scores.
            softcap: What keeps them below itself, if anything does.
        """
        _, kv_heads, block_size, head_dim = keys.shape
        pointers = (q.data_ptr(), out.data_ptr(), keys.data_ptr(), values.data_ptr(), *spans.pointers, groups.data_ptr())
        sizes = (spans.count, kv_heads, head_dim, q.stride(0), out.stride(0), block_size, spans.width, window or 0)
        self._paged_attention(*pointers, *sizes, scale, softcap or 0.0)

    def silu_and_multiply(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up, [rows, 2 * size] -> [rows, size]."""
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, size)
        self._silu_and_multiply(address(gate_up), address(out), rows, size)
        return out

    def run_halves(self, step: ctypes.Structure, segment: ctypes.Structure | None, alone: bool, half: int, end: int) -> int:
        """Compute halves of layers, as `native_blocks` describes them; only where `can_multiply`.

        Args:
            step: What is computed.
            segment: The memory that sums between ranks are made in.
            alone: Whether there is nothing to sum.
            half: The first; attention and mlp of a layer count as one each.
            end: Where to stop.

        Returns:
            The half that is next. Before the end it is one whose sum waits for other ranks; or, without a segment, what has been computed
            has yet to be summed.
        """
        return self._run_halves(ctypes.byref(step), segment and ctypes.byref(segment), alone, half, end)

    def pack(self, weight: Tensor, gated: bool = False, in_place: bool = False) -> PackedMatrix:
        """`weight` [outputs, inputs] packed: a copy, or in its own memory where it fits there.

        Args:
            weight: Overwritten if it is packed in place.
            gated: Its upper half is a gate of its lower half.
            in_place: Whether it may be.
        """
        return PackedMatrix(self, weight, gated, in_place)


class PackedMatrix:
    """A weight in the layout our product reads: panels of 32 outputs (if gated, 16 of the gate and what they gate), inputs two by two.

    Attributes:
        address: Where it is.
        together: Rows that are multiplied together.
    """

    def __init__(self, kernels: Kernels, weight: Tensor, gated: bool, in_place: bool) -> None:
        outputs, inputs = weight.shape
        self._width, pairs = outputs // 2 if gated else outputs, (inputs + 1) // 2
        if in_place and weight.is_contiguous() and outputs % (2 * _LANES) == inputs % 2 == 0:
            self._packed = weight
            kernels._pack_in_place(address(weight), outputs, inputs, gated)
        else:
            panels = -(-self._width // (_LANES if gated else 2 * _LANES))
            self._packed = huge_pages.zeros((panels, pairs, 2 * _LANES), torch.int32)
            kernels._pack_matrix(address(weight.contiguous()), address(self._packed), outputs, inputs, gated)
        self.together = min(max(_NEAR // (2 * inputs) // _TILE, 1), 24) * _TILE
        self.address, self._kernels = self._packed.data_ptr(), kernels
        self._sizes = (outputs, inputs, self.together, gated)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [rows, inputs] times the weight, plus `bias` [outputs]: [rows, outputs]; if gated silu(gate) * up, half as wide."""
        x, kernels = x.contiguous(), self._kernels
        y = torch.empty(len(x), self._width, dtype=x.dtype)
        kernels._multiply(x.data_ptr(), self.address, address(bias), y.data_ptr(), x.shape[0], *self._sizes)
        return y

    def logits(self, x: Tensor, delta: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        """Add `delta` to `x` [rows, inputs] in place, normalize as `Kernels.add_rms_norm`, and multiply: [rows, outputs] float32."""
        kernels, (outputs, inputs, together, gated) = self._kernels, self._sizes
        assert not gated and x.is_contiguous() and delta.is_contiguous()
        out = torch.empty(len(x), outputs)
        pointers = (self.address, out.data_ptr())
        kernels._logits(x.data_ptr(), delta.data_ptr(), weight.data_ptr(), eps, offset, *pointers, len(x), outputs, inputs, together)
        return out


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers begin, as a compiled function is told; null where there is none."""
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def kernels(dtype: torch.dtype) -> Kernels | None:
    """The kernels for tensors of `dtype` in CPU memory, or None where they cannot be had."""
    if dtype not in NAMES:
        return None
    compiled = library()
    return None if compiled is None else Kernels(compiled, dtype)


def read_runs(fd: int, to: Tensor, offset: int, length: int, stride: int, runs: int) -> int | None:
    """Read `runs` runs of `length` bytes, one every `stride` bytes of a file, one after another into `to` (uint8), in one call.

    Returns:
        The bytes read, fewer than all where the file ends; None where there are no kernels.

    Raises:
        OSError: Reading failed.
    """
    compiled = library()
    if compiled is None:
        return None
    assert to.is_contiguous() and to.nbytes >= length * runs
    count = compiled.read_runs(fd, address(to), offset, length, stride, runs)
    if count < 0:
        raise OSError(-count, os.strerror(-count))
    return count


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled file with its functions' types; built unless an earlier process did, None without a compiler that can."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return None
    try:
        version = subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, check=True).stdout
        machine = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        # What a program is made of decides its name: a home directory may be shared by unlike machines.
        features = "".join(line for line in machine.splitlines() if line.startswith(("model", "flags", "Features")))
        source = SOURCE.read_bytes()
        name = hashlib.sha256(b"\0".join((source, FLAGS.encode(), version, features.encode()))).hexdigest()[:16]
        target = _cache() / f"native-{name}.so"
        if not target.exists():
            _build(compiler, source, target)
        compiled = ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError):
        return None
    for function, arguments, result in _FUNCTIONS:
        getattr(compiled, function).argtypes, getattr(compiled, function).restype = arguments, result
    return compiled


def _cache() -> Path:
    """Where built files are kept."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dist_infer"
    try:
        base.mkdir(parents=True, exist_ok=True)
        if os.access(base, os.W_OK):
            return base
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="dist_infer-"))


def _build(compiler: str, source: bytes, target: Path) -> None:
    """Compile `source`, which `target` is named for, to `target`; ranks that start at once wait for the first."""
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return
        with tempfile.TemporaryDirectory(dir=target.parent) as directory:
            code, partial, made = (Path(directory, f"native.{kind}") for kind in ("cpp", "o", "so"))
            code.write_bytes(source)
            # Linked without a threading library of its own: the threads are those torch has loaded already.
            for command in (f"{FLAGS} -c {code} -o {partial}", f"-shared {partial} -o {made}"):
                subprocess.run([*shlex.split(compiler), *shlex.split(command)], capture_output=True, check=True)
            made.rename(target)

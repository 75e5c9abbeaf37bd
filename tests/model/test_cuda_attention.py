"""Triton's paged attention beside the formula; in Triton's interpreter where there is no GPU, and compiled for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dist_infer.model.attention_plan import Span, SpanTable
from dist_infer.model.cuda_kernels import CudaKernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter multiplies no bfloat16.
TYPES = [torch.float32, torch.bfloat16 if DEVICE.type == "cuda" else torch.float16]
BLOCK = 16
MIXED = [(1, 1), (1, 130), (5, 5), (17, 70), (1, 64), (70, 99)]  # tokens, context
SINGLE = [(1, 1), (1, 130), (1, 64), (1, 17)]
LONG = [(1, 3000), (1, 700)]


class Example:
    """Spans over a pool in any order; what no span may read is NaN."""

    def __init__(self, spans: list[tuple[int, int]], counts: list[int], head_dim: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(len(spans))
        self.counts, heads, kv_heads = counts, sum(counts), len(counts)
        used = [-(-context // BLOCK) for _, context in spans]
        order = (torch.randperm(sum(used), generator=generator) + 1).int().split(used)
        starts = torch.tensor([0, *(length for length, _ in spans)]).cumsum(0).tolist()
        shape = (2, sum(used) + 1, kv_heads, BLOCK, head_dim)
        pools = torch.full(shape, torch.nan)
        for (_, context), blocks in zip(spans, order, strict=True):
            for place, block in enumerate(blocks.tolist()):
                filled = min(BLOCK, context - place * BLOCK)
                pools[:, block, :, :filled] = torch.randn(2, kv_heads, filled, head_dim, generator=generator)
        self.keys, self.values = pools.to(DEVICE, dtype)
        parts = zip(starts, spans, order, strict=False)
        self.table = SpanTable([Span(start, *span, blocks.numpy()) for start, span, blocks in parts], BLOCK, DEVICE)
        qkv = torch.randn(starts[-1], heads + 2 * kv_heads, head_dim, generator=generator)
        self.q = qkv.to(DEVICE, dtype)[:, :heads]
        self.groups = torch.tensor([0, *counts]).cumsum(0).to(DEVICE, torch.int32)

    def found(self, window: int | None, scale: float, softcap: float | None, processors: int) -> Tensor:
        """What the kernel says."""
        kernels = CudaKernels(DEVICE)
        kernels.processors = processors
        out = torch.full_like(self.q, torch.nan).contiguous()
        kernels.paged_attention(self.q, out, self.keys, self.values, self.table, self.groups, window, scale, softcap)
        return out

    def expected(self, window: int | None, scale: float, softcap: float | None) -> Tensor:
        """The formula, span by span in float32."""
        outputs = []
        offsets, repeats = self.table.offsets.tolist(), torch.tensor(self.counts, device=DEVICE)
        for span, context in enumerate(self.table.contexts.tolist()):
            start, stop = offsets[span : span + 2]
            blocks = self.table.tables[span, : -(-context // BLOCK)].long()
            keys, values = (
                pool[blocks].transpose(0, 1).flatten(1, 2)[:, :context].float().repeat_interleave(repeats, 0)
                for pool in (self.keys, self.values)
            )
            at_key = torch.arange(context, device=DEVICE)
            at_query = torch.arange(context - (stop - start), context, device=DEVICE)[:, None]
            hidden = at_key > at_query
            if window is not None:
                hidden |= at_key <= at_query - window
            scores = (self.q[start:stop].float().transpose(0, 1) @ keys.transpose(1, 2)) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            outputs.append((torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ values).transpose(0, 1))
        return torch.cat(outputs)


def check(example: Example, window: int | None = None, softcap: float | None = None, processors: int = 4) -> None:
    found, expected = example.found(window, 0.2, softcap, processors).float(), example.expected(window, 0.2, softcap)
    tolerance = 1e-5 if example.q.dtype == torch.float32 else 1e-2
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("spans", [MIXED, SINGLE], ids=["any", "single"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("counts", "head_dim"), [([4, 4], 64), ([3, 1], 16), ([8], 80), ([1, 1], 128)])
def test_it_is_the_formula(spans: list[tuple[int, int]], dtype: torch.dtype, counts: list[int], head_dim: int) -> None:
    check(Example(spans, counts, head_dim, dtype))


@pytest.mark.parametrize("spans", [MIXED, SINGLE, LONG], ids=["any", "single", "long"])
@pytest.mark.parametrize(("window", "softcap"), [(1, None), (40, None), (10_000, None), (None, 2.0), (40, 5.0)])
def test_windows_and_caps(spans: list[tuple[int, int]], window: int | None, softcap: float | None) -> None:
    check(Example(spans, [4, 4], 32, torch.float32), window, softcap)


@pytest.mark.parametrize("processors", [1, 4, 64])
def test_a_context_in_parts(processors: int) -> None:
    check(Example(LONG, [4, 4], 32, torch.float32), processors=processors)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dist_infer.model import cuda_attention, cuda_kernels
from dist_infer.sampling import cuda_noise

ALIGNED = [["tt.divisibility", 16]]  # as torch's memory and strides are; so tiles can be on their way while others are worked at
INTEGERS = {"kv_heads", "heads", "spans", "size", "q_stride", "out_stride", "table_stride", "first_token"}
INDICES = {"offsets", "contexts", "tables", "groups"}
HEAD = {"head_dim": 128, "padded_dim": 128}
LAYER = HEAD | {"scale": 0.1, "softcap": 0.0, "window": 0, "block_size": 16}
VARIANTS = [
    (cuda_attention._attend_spans, LAYER | {"group": 4, "queries": 16, "tile": 64}),
    (cuda_attention._attend_spans, LAYER | {"group": 1, "queries": 64, "tile": 64, "window": 100, "softcap": 30.0}),
    (cuda_attention._attend_tokens, LAYER | {"rows_padded": 16, "tile": 64, "parts": 4}),
    (cuda_attention._combine, HEAD | {"parts": 4, "padded_parts": 4}),
    (cuda_kernels._add_rms_norm, {"has_delta": True, "padded": 4096}),
    (cuda_kernels._rotate_and_cache, HEAD | {"block_size": 16, "rotary_dim": 64, "padded_half": 32, "norms": True}),
    (cuda_kernels._silu_and_multiply, {"chunk": 1024}),
    (cuda_noise._add_gumbel, {"chunk": 1024, "step": -(2**62) - 1, "mix1": -(2**61) - 1, "mix2": -(2**60) - 1}),
]


def kind(name):
    if name in INTEGERS:
        return "i32"
    if name in INDICES:
        return "*i32"
    if name == "slots":
        return "*i64"
    return "fp32" if name in ("eps", "offset") else "*fp32" if name.startswith("part_") else "*bf16"


for kernel, constants in VARIANTS:
    signature = {name: "constexpr" if name in constants else kind(name) for name in kernel.arg_names}
    if kernel is cuda_noise._add_gumbel:
        signature |= {"scaled": "*fp32", "out": "*fp32", "keys": "*i64"}
    place = kernel.arg_names.index
    values = {(place(name),): value for name, value in constants.items()}
    attrs = {(place(name),): ALIGNED for name, of in signature.items() if of[0] == "*" or (name.endswith("stride") and name[0] != "t")}
    for stages, room in ((cuda_kernels.MOST_STAGES, cuda_kernels.AMPLE), (cuda_kernels.MOST_STAGES - 1, 99 << 10)):
        source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attrs)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_stages": stages})
        assert made.metadata.shared <= room, (kernel, stages, made.metadata.shared)
        print(kernel.__name__, stages, made.metadata.shared, len(made.asm["cubin"]))
"""


@pytest.mark.large
def test_every_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 16

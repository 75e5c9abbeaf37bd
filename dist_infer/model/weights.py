"""Every weight, described once: its canonical name, global shape and the pieces of it a rank holds.

Loading, memory planning, `inspect` and in-memory transfer all read this description. Canonical
names are Hugging Face's. Pure arithmetic: no torch, no processes, so a plan for a thousand ranks
can be made on paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dist_infer.model.config import ModelConfig

Box = tuple[tuple[int, int], ...]  # (start, stop) for each dim


@dataclass(frozen=True)
class Piece:
    """A box of one canonical tensor that fills part of a local buffer.

    Attributes:
        name: Canonical (Hugging Face) name of the tensor.
        shape: Its global shape.
        box: The region of it that is held, as (start, stop) for each dim.
        row: First row (dim 0) of the local buffer that the region fills; the other dims fill it whole.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    row: int = 0

    @property
    def rows(self) -> int:
        """Rows of the local buffer this piece fills."""
        return self.box[0][1] - self.box[0][0]


@dataclass(frozen=True)
class Weight:
    """One local buffer of a tp rank, before fsdp cuts its rows again.

    Attributes:
        parameter: Name of the parameter in our decoder.
        shape: Local shape on this tp rank.
        pieces: What fills it, in row order; together they cover every row exactly once.
    """

    parameter: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def elements(self) -> int:
        """Elements of the local buffer."""
        return math.prod(self.shape)


def cut(size: int, parts: int, index: int) -> tuple[int, int]:
    """(start, stop) of part `index` when `size` is cut contiguously as evenly as it goes."""
    base, extra = divmod(size, parts)
    start = index * base + min(index, extra)
    return start, start + base + (index < extra)


def fsdp_rows(rows: int, fsdp: int, coordinate: int) -> tuple[int, int]:
    """(start, stop) of the rows fsdp coordinate `coordinate` holds (`torch.chunk`, as FSDP2 cuts)."""
    chunk = -(-rows // fsdp)
    return min(coordinate * chunk, rows), min((coordinate + 1) * chunk, rows)


@dataclass(frozen=True)
class HeadCut:
    """Which query and KV heads a tp rank holds: queries contiguously, and the KV heads they touch."""

    heads: tuple[int, int]
    kv_heads: tuple[int, int]

    @classmethod
    def of(cls, config: ModelConfig, tp: int, rank: int) -> HeadCut:
        """The cut of tp rank `rank`.

        Raises:
            ValueError: There are fewer query heads than tp ranks.
        """
        if tp > config.heads:
            raise ValueError(f"parallel.tp={tp}: the model has {config.heads} query heads; tp can be at most {config.heads}")
        first, stop = cut(config.heads, tp, rank)
        group = config.heads // config.kv_heads
        return cls((first, stop), (first // group, (stop - 1) // group + 1))


def describe(config: ModelConfig, tp: int = 1, rank: int = 0) -> Iterator[Weight]:
    """Every weight that tp rank `rank` of `tp` holds, in model order.

    Raises:
        ValueError: The model cannot be cut into `tp`.
    """
    hidden, head_dim = config.hidden_size, config.head_dim
    head_cut = HeadCut.of(config, tp, rank)
    q_rows = _scaled(head_cut.heads, head_dim)
    kv_rows = _scaled(head_cut.kv_heads, head_dim)
    ffn = cut(config.ffn_size, tp, rank)
    vocab = cut(config.vocab_size, tp, rank)

    yield _stack("embedding.weight", [("model.embed_tokens.weight", (config.vocab_size, hidden), (vocab, (0, hidden)))])
    for layer in range(config.layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        attention = [
            (f"{theirs}.self_attn.q_proj", config.heads * head_dim, q_rows),
            (f"{theirs}.self_attn.k_proj", config.kv_heads * head_dim, kv_rows),
            (f"{theirs}.self_attn.v_proj", config.kv_heads * head_dim, kv_rows),
        ]
        mlp = [(f"{theirs}.mlp.gate_proj", config.ffn_size, ffn), (f"{theirs}.mlp.up_proj", config.ffn_size, ffn)]
        yield _whole(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight", (hidden,))
        yield from _columns(f"{ours}.attention.qkv", attention, hidden, config.qkv_bias)
        if config.qk_norm:
            yield _whole(f"{ours}.attention.q_norm.weight", f"{theirs}.self_attn.q_norm.weight", (head_dim,))
            yield _whole(f"{ours}.attention.k_norm.weight", f"{theirs}.self_attn.k_norm.weight", (head_dim,))
        yield from _rows(
            f"{ours}.attention.output", f"{theirs}.self_attn.o_proj", hidden, config.heads * head_dim, q_rows, config.output_bias
        )
        yield _whole(f"{ours}.mlp_norm.weight", f"{theirs}.post_attention_layernorm.weight", (hidden,))
        yield from _columns(f"{ours}.mlp.gate_up", mlp, hidden, config.mlp_bias)
        yield from _rows(f"{ours}.mlp.down", f"{theirs}.mlp.down_proj", hidden, config.ffn_size, ffn, config.mlp_bias)
    yield _whole("norm.weight", "model.norm.weight", (hidden,))
    if not config.tied_head:
        yield _stack("head.weight", [("lm_head.weight", (config.vocab_size, hidden), (vocab, (0, hidden)))])


def _scaled(heads: tuple[int, int], head_dim: int) -> tuple[int, int]:
    return heads[0] * head_dim, heads[1] * head_dim


def _stack(parameter: str, parts: list[tuple[str, tuple[int, ...], Box]]) -> Weight:
    """A buffer filled by boxes stacked along dim 0."""
    pieces, row = [], 0
    for name, shape, box in parts:
        pieces.append(Piece(name, shape, box, row))
        row += box[0][1] - box[0][0]
    rest = tuple(stop - start for start, stop in parts[0][2][1:])
    return Weight(parameter, (row, *rest), tuple(pieces))


def _whole(parameter: str, name: str, shape: tuple[int, ...]) -> Weight:
    """A weight every tp rank holds whole."""
    return _stack(parameter, [(name, shape, tuple((0, size) for size in shape))])


def _columns(parameter: str, parts: list[tuple[str, int, tuple[int, int]]], inputs: int, bias: bool) -> Iterator[Weight]:
    """A column-parallel projection: output features are cut (rows of the matrix)."""
    yield _stack(f"{parameter}.weight", [(f"{name}.weight", (outputs, inputs), (rows, (0, inputs))) for name, outputs, rows in parts])
    if bias:
        yield _stack(f"{parameter}.bias", [(f"{name}.bias", (outputs,), (rows,)) for name, outputs, rows in parts])


def _rows(parameter: str, name: str, outputs: int, inputs: int, columns: tuple[int, int], bias: bool) -> Iterator[Weight]:
    """A row-parallel projection: input features are cut (columns of the matrix); the bias is whole."""
    yield _stack(f"{parameter}.weight", [(f"{name}.weight", (outputs, inputs), ((0, outputs), columns))])
    if bias:
        yield _whole(f"{parameter}.bias", f"{name}.bias", (outputs,))

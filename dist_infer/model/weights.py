"""Every weight, described once: its canonical name, global shape and the pieces of it a rank holds.

Loading, memory planning, `inspect` and in-memory transfer all read this description. Canonical
names are Hugging Face's. Pure arithmetic: no torch, no processes, so a plan for a thousand ranks
can be made on paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dist_infer.model.config import ExpertsConfig, ModelConfig

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
        if config.fallback is not None:
            from dist_infer.model import fallback

            if not fallback.cuts_heads(config):
                return cls((0, config.heads), (0, config.kv_heads))
        if tp > config.heads:
            raise ValueError(f"parallel.tp={tp}: the model has {config.heads} query heads; tp can be at most {config.heads}")
        first, stop = cut(config.heads, tp, rank)
        group = config.heads // config.kv_heads
        return cls((first, stop), (first // group, (stop - 1) // group + 1))


@dataclass(frozen=True)
class ExpertCut:
    """Which experts of a layer a tp rank holds, and which part of each one's ffn.

    Whole experts where every rank gets as many; else all of them, each one's ffn cut.
    """

    experts: tuple[int, int]
    ffn: tuple[int, int]

    @classmethod
    def of(cls, experts: ExpertsConfig, tp: int, rank: int) -> ExpertCut:
        """The cut of tp rank `rank`."""
        if experts.count % tp == 0:
            return cls(cut(experts.count, tp, rank), (0, experts.ffn_size))
        return cls((0, experts.count), cut(experts.ffn_size, tp, rank))


# A layer's norms in our decoder, and their canonical names, by where they are placed.
_NORMS = {
    "pre": {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "post": {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"},
    "both": {
        "attention_norm": "input_layernorm",
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    },
}


def describe(config: ModelConfig, tp: int = 1, rank: int = 0) -> Iterator[Weight]:
    """Every weight that tp rank `rank` of `tp` holds, in model order.

    Raises:
        ValueError: The model cannot be cut into `tp`.
    """
    if config.fallback is not None:
        from dist_infer.model import fallback

        yield from fallback.describe(config, tp, rank)
        return
    hidden, head_dim = config.hidden_size, config.head_dim
    head_cut = HeadCut.of(config, tp, rank)
    q_rows = _scaled(head_cut.heads, head_dim)
    kv_rows = _scaled(head_cut.kv_heads, head_dim)
    ffn = cut(config.ffn_size, tp, rank)
    vocab = cut(config.vocab_size, tp, rank)

    yield _stack("embedding.weight", [("model.embed_tokens.weight", (config.vocab_size, hidden), (vocab, (0, hidden)))])
    if config.learned_positions:
        yield _whole("positions.weight", "model.embed_positions.weight", (config.max_position, hidden))
    for layer in range(config.layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        attention = [
            (f"{theirs}.self_attn.q_proj", config.heads * head_dim, q_rows),
            (f"{theirs}.self_attn.k_proj", config.kv_heads * head_dim, kv_rows),
            (f"{theirs}.self_attn.v_proj", config.kv_heads * head_dim, kv_rows),
        ]
        for place, name in _NORMS[config.norm_placement].items():
            yield from _norm(f"{ours}.{place}", f"{theirs}.{name}", config)
        yield from _columns(f"{ours}.attention.qkv", attention, hidden, config.qkv_bias)
        if config.qk_norm == "head":
            yield _whole(f"{ours}.attention.q_norm.weight", f"{theirs}.self_attn.q_norm.weight", (head_dim,))
            yield _whole(f"{ours}.attention.k_norm.weight", f"{theirs}.self_attn.k_norm.weight", (head_dim,))
        elif config.qk_norm == "full":
            q_weight, k_weight = (f"{theirs}.self_attn.{kind}_norm.weight" for kind in "qk")
            yield _stack(f"{ours}.attention.norm_across.q_weight", [(q_weight, (config.heads * head_dim,), (q_rows,))])
            yield _stack(f"{ours}.attention.norm_across.k_weight", [(k_weight, (config.kv_heads * head_dim,), (kv_rows,))])
        yield from _rows(
            f"{ours}.attention.output", f"{theirs}.self_attn.o_proj", hidden, config.heads * head_dim, q_rows, config.output_bias
        )
        if config.experts is not None and layer in config.experts.layers:
            yield from _experts(config, config.experts, tp, rank, f"{ours}.mlp", f"{theirs}.mlp")
        else:
            yield from _mlp(config, f"{ours}.mlp", f"{theirs}.mlp", config.ffn_size, ffn, config.mlp_bias)
    yield from _norm("norm", "model.norm", config)
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


def _norm(parameter: str, name: str, config: ModelConfig) -> Iterator[Weight]:
    """A norm over the hidden size."""
    yield _whole(f"{parameter}.weight", f"{name}.weight", (config.hidden_size,))
    if config.norm == "layer":
        yield _whole(f"{parameter}.bias", f"{name}.bias", (config.hidden_size,))


def _mlp(config: ModelConfig, ours: str, theirs: str, size: int, ffn: tuple[int, int], bias: bool) -> Iterator[Weight]:
    """An mlp of `size`, of which the rank holds `ffn`."""
    parts = [(f"{theirs}.{kind}", size, ffn) for kind in _inward(config)]
    yield from _columns(f"{ours}.{'gate_up' if config.gated_mlp else 'up'}", parts, config.hidden_size, bias)
    yield from _rows(f"{ours}.down", f"{theirs}.down_proj", config.hidden_size, size, ffn, bias)


def _experts(config: ModelConfig, experts: ExpertsConfig, tp: int, rank: int, ours: str, theirs: str) -> Iterator[Weight]:
    """A mixture of experts: the rank's experts one after another, of each its gate above its up."""
    hidden, size, held = config.hidden_size, experts.ffn_size, ExpertCut.of(experts, tp, rank)
    names = [f"{theirs}.experts.{expert}" for expert in range(*held.experts)]
    yield _whole(f"{ours}.router.gate.weight", f"{theirs}.gate.weight", (experts.count, hidden))
    if experts.score_bias:
        yield _whole(f"{ours}.router.score_bias", f"{theirs}.gate.e_score_correction_bias", (experts.count,))
    inward = [(f"{name}.{kind}", size, held.ffn) for name in names for kind in _inward(config)]
    yield from _columns(f"{ours}.experts.gate_up", inward, hidden, bias=False)
    outward = [(f"{name}.down_proj.weight", (hidden, size), ((0, hidden), held.ffn)) for name in names]
    yield _stack(f"{ours}.experts.down.weight", outward)
    if experts.shared_ffn_size:
        shared = cut(experts.shared_ffn_size, tp, rank)
        yield from _mlp(config, f"{ours}.shared", f"{theirs}.shared_expert", experts.shared_ffn_size, shared, bias=False)
    if experts.shared_gate:
        yield _whole(f"{ours}.shared_gate.weight", f"{theirs}.shared_expert_gate.weight", (1, hidden))


def _inward(config: ModelConfig) -> tuple[str, ...]:
    """The projections of an mlp from the hidden size."""
    return ("gate_proj", "up_proj") if config.gated_mlp else ("up_proj",)


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

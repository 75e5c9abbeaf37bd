"""Dialects that are tables: for each kind of weight, the name it is stored under and how it lies there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from dist_infer.checkpoint.dialects.dialect import Dialect
from dist_infer.model.config import ModelConfig
from dist_infer.model.stored import Stored

_LAYER = re.compile(r"(?<=^model\.layers\.)\d+(?=\.)")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


@dataclass(frozen=True)
class Place:
    """Where weights of one kind are stored.

    Attributes:
        name: The stored name, with `{layer}` and `{expert}` for numbers and `{kind}` for "weight" or "bias"
            (which is added at the end when it is left out).
        parts: Of a fused matrix, the projections in it in the order of their rows, such as ("q_proj",
            "k_proj", "v_proj"); a number stands for that many rows of something else.
        grouped: Whether the parts are interleaved by KV group: a group's queries, its key, its value.
        packed: Whether it is a pack of all experts' matrices, [experts, ...].
        transposed: Whether the matrix is [inputs, outputs].
    """

    name: str
    parts: tuple[str | int, ...] = ()
    grouped: bool = False
    packed: bool = False
    transposed: bool = False


Entry = str | Place | tuple[str | Place, ...]
Table = Mapping[str, Entry]


class TableDialect(Dialect):
    """A dialect whose `table` maps canonical names to places, or to several of which the first that is there counts.

    Keys are canonical names with `{layer}` and `{expert}` for numbers, without the final `.weight` or
    `.bias` (a key with it goes before one without).

    Attributes:
        table: What holds for every model.
        norms: What depends on where a model has its norms, by `ModelConfig.norm_placement`; goes before `table`.
        ignored: Names of stored tensors that are no weights, written as in the table.
        rotary: "half", or "interleaved" when the elements of a rotary pair are stored side by side; a model's
            configuration may say otherwise.
    """

    table: ClassVar[Table]
    norms: ClassVar[Mapping[str, Table]] = {}
    ignored: ClassVar[tuple[str, ...]] = ()
    rotary: ClassVar[str] = "half"

    @classmethod
    def landmarks(cls) -> list[tuple[str, str]]:
        """Of the embedding and of the first layer's output projection."""
        embeddings = [place.name for place in _places("model.embed_tokens.weight", cls.table)]
        outputs = [place.name for place in _places("model.layers.{layer}.self_attn.o_proj.weight", cls.table)]
        return [(embedding, output.replace("{layer}", "0")) for embedding in embeddings for output in outputs]

    def place(self, name: str, config: ModelConfig) -> Stored:
        """The first of its places that is there; where it would be in the first one when none is."""
        layer, expert = _LAYER.search(name), _EXPERT.search(name)
        key = _EXPERT.sub("{expert}", _LAYER.sub("{layer}", name))
        chosen: tuple[str, Place] | None = None
        for place in _places(key, self.norms.get(config.norm_placement, {}), self.table):
            tensor = place.name.replace("{layer}", layer[0] if layer else "").replace("{expert}", expert[0] if expert else "")
            if chosen is None or self.prefix + tensor in self.names:
                chosen = (self.prefix + tensor, place)
            if self.prefix + tensor in self.names:
                break
        if chosen is None:
            return Stored(self.prefix + name)
        tensor, place = chosen
        path, _, kind = key.rpartition(".")
        stored = _lying(path, kind == "weight", place, config)
        member = int(expert[0]) if place.packed and expert else None
        return replace(stored, tensor=self.names.get(tensor, tensor), pairs=self.pairs(name, config), member=member)

    def interleaved(self, config: ModelConfig) -> bool:
        """By the model's configuration, or else as the trainer does."""
        return self.rotary == "interleaved" if config.interleaved_rotary is None else config.interleaved_rotary

    def is_buffer(self, name: str) -> bool:
        """Tables of every dialect, and what this one ignores."""
        return super().is_buffer(name) or any(_matches(pattern, name.removeprefix(self.prefix)) for pattern in self.ignored)


def _places(key: str, *tables: Table) -> Iterator[Place]:
    """The places of canonical name `key`, by the first of `tables` that has it; their names are whole but for numbers."""
    path, _, kind = key.rpartition(".")
    for table in tables:
        for known in (key, path):
            if known in table:
                entry = table[known]
                for one in entry if isinstance(entry, tuple) else (entry,):
                    place = Place(one) if isinstance(one, str) else one
                    named = place.name if known == key or "{kind}" in place.name else f"{place.name}.{{kind}}"
                    yield replace(place, name=named.replace("{kind}", kind))
                return


def _lying(path: str, matrix: bool, place: Place, config: ModelConfig) -> Stored:
    """Offset, groups and shape of the projection at `path`, or of its bias, in `place`."""
    if not (place.parts or place.packed or (place.transposed and matrix)):
        return Stored("")
    parent, _, leaf = path.rpartition(".")
    parts = place.parts or (leaf,)
    sizes = [part if isinstance(part, int) else shape_of(f"{parent}.{part}", config)[0] for part in parts]
    at = parts.index(leaf)
    offset = sum(sizes[:at])
    shape = (sum(sizes), shape_of(path, config)[1])
    group = stride = 0
    if place.grouped:
        offset, group, stride = offset // config.kv_heads, sizes[at] // config.kv_heads, shape[0] // config.kv_heads
    if not matrix:
        shape = shape[:1]
    elif place.transposed:
        shape = shape[::-1]
    if place.packed:
        assert config.experts is not None
        shape = (config.experts.count, *shape)
    return Stored("", shape=shape, offset=offset, group=group, stride=stride, transposed=place.transposed and matrix)


def shape_of(path: str, config: ModelConfig) -> tuple[int, int]:
    """(outputs, inputs) of the canonical matrix whose name begins with `path`.

    Raises:
        KeyError: It is no matrix.
    """
    hidden, queries, keys = config.hidden_size, config.heads * config.head_dim, config.kv_heads * config.head_dim
    ffn, experts = config.ffn_size, 0
    if config.experts is not None:
        experts = config.experts.count
        if ".experts." in path:
            ffn = config.experts.ffn_size
        elif ".shared_expert." in path:
            ffn = config.experts.shared_ffn_size
    return {
        "embed_tokens": (config.vocab_size, hidden),
        "lm_head": (config.vocab_size, hidden),
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
        "gate": (experts, hidden),
    }[path.rpartition(".")[2]]


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\{layer\}", r"\d+").replace(r"\{expert\}", r"\d+"), name) is not None

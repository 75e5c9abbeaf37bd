"""What the shapes of a checkpoint's weights tell of its model, and what they do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from dist_infer.checkpoint.dialects import Dialect
from dist_infer.checkpoint.sources.source import TensorEntry
from dist_infer.model.config import PLACEMENTS, ExpertsConfig, ModelConfig

UNSTATED_LENGTH = 4096  # tokens of the longest sequence, when a trainer's files do not say
# Fields that no shape tells; `rope` not where positions have a table.
_ASKED = ("heads", "norm_eps", "max_position", "rope")
_SIZES = ("family", "vocab_size", "hidden_size", "ffn_size", "layers", "heads", "kv_heads", "head_dim", "norm_eps", "max_position")
_HINTS = {
    "heads": "query heads; or head_dim",
    "norm_eps": "epsilon of the norms, such as 1e-5",
    "max_position": "tokens of the longest sequence",
    "rope": "{rope_type: default, rope_theta: TODO}  # the base, and scaling if there is one; as transformers' rope_parameters",
    "tied_head": "true: there is no head of its own in the checkpoint",
    "norm_placement": "pre (of a branch's input) or post (of its output)",
    "experts.chosen": "experts a token goes to",
}


@dataclass(frozen=True)
class Shapes:
    """What a checkpoint's shapes tell.

    Attributes:
        fields: Fields of ModelConfig; those of the experts as a dictionary.
        queries: Width of all query heads together; None when it is not told.
        keys: Width of all KV heads together.
        ambiguous: Fields that the weights of some trainers tell and those of this one do not.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    queries: int | None = None
    keys: int | None = None
    ambiguous: tuple[str, ...] = ()

    def complete(self, given: Mapping[str, Any]) -> ModelConfig:
        """The model of the fields that are `given` and, where they are silent, of what the shapes tell.

        Raises:
            ValueError: Something is neither given nor told; it is named.
        """
        values = {**self.fields, **given}
        if values.get("experts") is not None and not isinstance(values["experts"], ExpertsConfig):
            values["experts"] = self._experts(values["experts"])
        if self.fields.get("tied_head") and "tied_head" not in given:
            del values["tied_head"]  # that there is no head is no proof that it is tied
        if self.queries is not None and self.keys is not None:
            if "head_dim" not in values and "heads" in values:
                values["head_dim"] = _divide(self.queries, values["heads"], "heads")
            if "heads" not in values and "head_dim" in values:
                values["heads"] = _divide(self.queries, values["head_dim"], "head_dim")
            if "kv_heads" not in values and "head_dim" in values:
                values["kv_heads"] = _divide(self.keys, values["head_dim"], "head_dim")
        wanted = [*_SIZES, *self.ambiguous, *([] if values.get("learned_positions") else ["rope"])]
        wanted += ["tied_head"] if self.fields.get("tied_head") else []
        absent = [name for name in wanted if name not in values]
        if absent:
            raise ValueError(f"field {absent[0]!r} is missing" + (f", and {', '.join(absent[1:])}" if absent[1:] else ""))
        return ModelConfig(**values)

    def _experts(self, given: Mapping[str, Any]) -> ExpertsConfig:
        values = {**(self.fields.get("experts") or {}), **given}
        absent = [name for name in ("count", "chosen", "ffn_size", "layers") if name not in values]
        if absent:
            raise ValueError(f"field 'experts.{absent[0]}' is missing")
        return ExpertsConfig(**values)

    def asked(self) -> list[str]:
        """The fields that must be given."""
        derived = ("kv_heads", "head_dim") if self.queries is not None else ()
        missing = [name for name in _SIZES if name not in (*self.fields, *_ASKED, *derived)]
        asked = [name for name in _ASKED if name not in self.fields and not (name == "rope" and self.fields.get("learned_positions"))]
        asked += ["tied_head"] if self.fields.get("tied_head") else []
        return [*missing, *asked, *self.ambiguous, *(["experts.chosen"] if self.fields.get("experts") else [])]

    def ask(self, before: str = "") -> str:
        """Words that ask for what is not told."""
        told = "; the weights tell the rest" if self.queries is not None else ""
        line = f" such as {{{', '.join(f'{name}: {self._example(name)}' for name in self._asked_once())}}}"
        return f"{before}a trainer's configuration or YAML with {', '.join(self.asked())}{told},{line}"

    def stub(self) -> str:
        """A configuration file to fill in: what is told, and TODO where something is not."""
        lines = [
            "# To be filled in where it says TODO, and given as model.config=FILE. Other traits that no shape tells,",
            "# such as activation, sliding_windows or embedding_scale, are taken to be Llama's unless they are added here.",
        ]
        for name, value in self.fields.items():
            if name not in ("experts", *self.asked()):
                lines.append(f"{name}: {_yaml(value)}")
        for name in self.asked():
            if "." not in name:
                hint = _HINTS.get(name, "")
                lines.append(f"{name}: {hint}" if hint.startswith("{") else f"{name}: TODO  # {hint}".rstrip("# "))
        experts = self.fields.get("experts")
        if experts:
            inner = ", ".join([*(f"{name}: {_yaml(value)}" for name, value in experts.items()), "chosen: TODO"])
            lines.append(f"experts: {{{inner}}}  # chosen: {_HINTS['experts.chosen']}; scoring: softmax or sigmoid")
        return "\n".join(lines)

    def _asked_once(self) -> list[str]:
        return list(dict.fromkeys(name.partition(".")[0] for name in self.asked()))

    def _example(self, name: str) -> str:
        return {"rope": "{rope_theta: TODO}", "experts": "{chosen: TODO}"}.get(name, "TODO")


def tell(index: Mapping[str, TensorEntry], dialect: Dialect) -> Shapes:
    """What the shapes in `index`, whose names are of `dialect`, tell."""
    return _Reading(index, dialect).shapes()


class _Reading:
    """Looks weights up by canonical names before the model is known; only the names and orientation of places count then."""

    def __init__(self, index: Mapping[str, TensorEntry], dialect: Dialect) -> None:
        self.index, self.dialect = index, dialect
        self.placement = "pre"

    def shapes(self) -> Shapes:
        """All of it."""
        embedding, output = self.matrix("model.embed_tokens"), self.matrix("model.layers.0.self_attn.o_proj")
        if embedding is None or output is None:
            return Shapes()
        layers = next(number for number in count() if self.matrix(f"model.layers.{number}.self_attn.o_proj") is None)
        fits = [placement for placement in PLACEMENTS if self.has_norms(placement)]
        self.placement = fits[0] if fits else "pre"
        queries, keys = output[1], self.key_width(output[1])
        told: dict[str, Any] = {"vocab_size": embedding[0], "hidden_size": embedding[1], "layers": layers}
        experts = self.experts(layers)
        dense = next((layer for layer in range(layers) if experts is None or layer not in experts["layers"]), None)
        ffn = None if dense is None else self.inputs(f"model.layers.{dense}.mlp.down_proj")
        if ffn is not None or experts is not None:
            told["ffn_size"] = ffn if ffn is not None or experts is None else experts["ffn_size"]
        told["tied_head"] = self.entry("lm_head.weight") is None
        for name, weight in (
            ("qkv_bias", "self_attn.q_proj.bias"),
            ("output_bias", "self_attn.o_proj.bias"),
            ("mlp_bias", "mlp.down_proj.bias"),
        ):
            told[name] = self.entry(f"model.layers.{dense or 0}.{weight}") is not None
        if self.entry(f"model.layers.{dense or 0}.mlp.up_proj.weight") is not None:
            told["gated_mlp"] = self.entry(f"model.layers.{dense or 0}.mlp.gate_proj.weight") is not None
        norm = self.entry("model.layers.0.self_attn.q_norm.weight")
        told["qk_norm"] = None if norm is None else "full" if norm.shape[0] == queries else "head"
        if norm is not None and told["qk_norm"] == "head":
            told["head_dim"] = norm.shape[0]
            told["heads"] = _divide(queries, norm.shape[0], "head_dim")
        told["norm"] = "layer" if self.entry("model.norm.bias") is not None else "rms"
        if self.entry("model.embed_positions.weight") is not None:
            told["learned_positions"] = True
        if len(fits) == 1:
            told["norm_placement"] = fits[0]
        if experts is not None:
            told["experts"] = experts
        told = {"family": _family(told), **told}
        if self.dialect.interleaved(self.config(told["family"])):
            told["interleaved_rotary"] = True
        return Shapes(told, queries, keys, () if len(fits) == 1 else ("norm_placement",))

    def config(self, family: str = "llama") -> ModelConfig:
        """A model that is there to ask for names alone."""
        experts = ExpertsConfig(1, 1, 1, ())
        return ModelConfig(family, 1, 1, 1, 1, 1, 1, 1, 1.0, 1, norm_placement=self.placement, experts=experts)

    def entry(self, name: str) -> TensorEntry | None:
        """The stored tensor that holds the canonical one."""
        return self.index.get(self.dialect.map(name, self.config()).tensor)

    def matrix(self, path: str) -> tuple[int, int] | None:
        """Rows and columns of the stored matrix that holds the canonical one, turned as that one."""
        entry, place = self.entry(f"{path}.weight"), self.dialect.map(f"{path}.weight", self.config())
        if entry is None or len(entry.shape) != (2 if place.member is None else 3):
            return None
        rows, columns = entry.shape[-2:]
        return (columns, rows) if place.transposed else (rows, columns)

    def inputs(self, path: str) -> int | None:
        """Columns of the canonical matrix."""
        found = self.matrix(path)
        return None if found is None else found[1]

    def key_width(self, queries: int) -> int | None:
        """Width of the keys: alone, beside the values, or beside queries and values."""
        layer = "model.layers.0.self_attn"
        tensors = [self.dialect.map(f"{layer}.{name}_proj.weight", self.config()).tensor for name in "qkv"]
        found = self.matrix(f"{layer}.k_proj")
        if found is None:
            return None
        if tensors[0] == tensors[1]:
            return (found[0] - queries) // 2
        return found[0] // 2 if tensors[1] == tensors[2] else found[0]

    def has_norms(self, placement: str) -> bool:
        """Whether the first layer has the norms of `placement` and no others of a layer."""
        wanted = {
            "pre": ("input", "post_attention"),
            "post": ("post_attention", "post_feedforward"),
            "both": ("input", "post_attention", "pre_feedforward", "post_feedforward"),
        }
        every, self.placement = wanted["both"], placement
        here = {name: self.dialect.map(f"model.layers.0.{name}_layernorm.weight", self.config()).tensor in self.index for name in every}
        return {name for name in every if here[name]} == set(wanted[placement])

    def experts(self, layers: int) -> dict[str, Any] | None:
        """The fields of ExpertsConfig that are told."""
        mlps = {layer: f"model.layers.{layer}.mlp" for layer in range(layers)}
        having = tuple(layer for layer, mlp in mlps.items() if self.matrix(f"{mlp}.gate") is not None)
        if not having:
            return None
        mlp = mlps[having[0]]
        router, ffn = self.matrix(f"{mlp}.gate"), self.inputs(f"{mlp}.experts.0.down_proj")
        shared = self.inputs(f"{mlp}.shared_expert.down_proj")
        biased = self.entry(f"{mlp}.gate.e_score_correction_bias") is not None
        told = {"count": router[0] if router else None, "ffn_size": ffn, "layers": having, "shared_ffn_size": shared or 0}
        return {**told, "shared_gate": self.entry(f"{mlp}.shared_expert_gate.weight") is not None, "score_bias": biased}


def _family(told: Mapping[str, Any]) -> str:
    """The family such a model most likely is; it names weights on disk and decides little else."""
    if told["qk_norm"] == "head":
        return "qwen3"
    if told["qk_norm"] == "full" and told.get("norm_placement") == "post":
        return "olmo2"
    return "qwen2" if told["qkv_bias"] and not told["output_bias"] else "llama"


def _divide(width: int, by: int, name: str) -> int:
    if by <= 0 or width % by:
        raise ValueError(f"{name} = {by} does not divide the {width} rows of the checkpoint's projections")
    return width // by


def _yaml(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)

"""What a trainer's names mean: from canonical (Hugging Face) names to stored tensors and the order of their rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import ClassVar

from dist_infer.model.config import ModelConfig
from dist_infer.model.stored import Stored

_ROTATED = ("q_proj", "k_proj", "q_norm", "k_norm")
# Modules that wrap others without having weights; their names may stand anywhere in a weight's.
_WRAPPERS = re.compile(r"(?<=\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Each stored name by its name without the wrappers (torch.compile, activation checkpointing, FSDP) in the middle."""
    return {_WRAPPERS.sub("", name): name for name in names}


def prefixes_before(landmarks: Iterable[tuple[str, str]], names: Mapping[str, str]) -> list[str]:
    """What stands in `names` before an embedding, where the witness is there too."""
    found = set()
    for embedding, witness in landmarks:
        candidates = (name.removesuffix(embedding) for name in names if name.endswith(embedding))
        found |= {prefix for prefix in candidates if prefix[-1:] in ("", ".") and prefix + witness in names}
    return sorted(found)


class Dialect:
    """A trainer's naming, bound to the names of one checkpoint.

    Attributes:
        name: What users call it.
        names: Stored name of every tensor, by its name without wrappers.
        prefix: What stands before the names of all weights.
    """

    name: ClassVar[str]

    def __init__(self, names: Mapping[str, str], prefix: str) -> None:
        self.names = names
        self.prefix = prefix
        self._mapped: tuple[ModelConfig | None, dict[str, Stored]] = (None, {})

    @classmethod
    def landmarks(cls) -> list[tuple[str, str]]:
        """Stored names of the token embedding and of one more weight that every model has, for each way they are named."""
        raise NotImplementedError

    @classmethod
    def prefixes(cls, names: Mapping[str, str]) -> list[str]:
        """The prefixes under which `names` hold a model of this dialect."""
        return prefixes_before(cls.landmarks(), names)

    def map(self, name: str, config: ModelConfig) -> Stored:
        """Where the canonical tensor `name` is stored; the tensor need not be there."""
        known, mapped = self._mapped
        if known is not config:
            mapped = {}
            self._mapped = (config, mapped)  # plans for many ranks ask for the same again and again
        if name not in mapped:
            mapped[name] = self.place(name, config)
        return mapped[name]

    def place(self, name: str, config: ModelConfig) -> Stored:
        """What `map` answers, thought out."""
        raise NotImplementedError

    def interleaved(self, config: ModelConfig) -> bool:
        """Whether the two elements of a rotary pair lie side by side in the stored weights."""
        return bool(config.interleaved_rotary)

    def pairs(self, name: str, config: ModelConfig) -> int:
        """Elements of a head whose rotary pairs lie side by side in the canonical tensor `name`; 0 when it has none such.

        Raises:
            ValueError: Only a part of each head is rotated, and its pairs lie side by side.
        """
        if not name.rpartition(".")[0].endswith(_ROTATED) or not self.interleaved(config):
            return 0
        if config.rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"interleaved rotary pairs with partial_rotary_factor {config.rope['partial_rotary_factor']} are not supported"
            )
        return config.head_dim

    def is_buffer(self, name: str) -> bool:
        """Whether the stored tensor `name` is a table that is computed anew rather than read."""
        return re.search(r"(^|\.)(inv_freq|freqs_cis|rope\.freqs|rope\.cache|rope_cache|cos_cached|sin_cached)$", name) is not None

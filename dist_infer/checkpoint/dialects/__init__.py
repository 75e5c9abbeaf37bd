"""Dialects: what each trainer's weight names and row orders mean."""

from __future__ import annotations

from collections.abc import Iterable

from dist_infer.checkpoint.dialects.described import is_description, read_dialect
from dist_infer.checkpoint.dialects.dialect import Dialect, unwrapped
from dist_infer.checkpoint.dialects.fast_llm import FastLLM
from dist_infer.checkpoint.dialects.huggingface import HuggingFace
from dist_infer.checkpoint.dialects.kempnerforge import KempnerForge
from dist_infer.checkpoint.dialects.litgpt import LitGPT
from dist_infer.checkpoint.dialects.olmo_core import OlmoCore
from dist_infer.checkpoint.dialects.torchtitan import Torchtitan
from dist_infer.checkpoint.dialects.torchtune import Torchtune
from dist_infer.model.config import ModelConfig

__all__ = ["DIALECTS", "Dialect", "find_dialect"]

DIALECTS: tuple[type[Dialect], ...] = (HuggingFace, KempnerForge, Torchtitan, OlmoCore, Torchtune, LitGPT, FastLLM)


def find_dialect(names: Iterable[str], wanted: str = "auto", config: ModelConfig | None = None) -> Dialect:
    """The dialect in which `names`, those of a checkpoint's tensors, are written.

    Args:
        names: Names of the stored tensors.
        wanted: A dialect's name, a YAML file that describes one, or "auto" to find the one whose weights are there.
        config: The model, if it is known: that of one that runs as transformers' own module tells its names.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: No dialect fits, more than one does, there are several models in the checkpoint, or the file
            does not describe a dialect.
    """
    if is_description(wanted):
        tried = [read_dialect(wanted)]
    elif wanted in ("auto", *(dialect.name for dialect in DIALECTS)):
        tried = [dialect for dialect in DIALECTS if wanted in ("auto", dialect.name)]
    else:
        known = ", ".join(dialect.name for dialect in DIALECTS)
        raise ValueError(f"model.dialect={wanted!r}: must be one of auto, {known}, or a YAML file that describes one")
    bare = unwrapped(names)
    found = [(dialect, prefix) for dialect in tried for prefix in dialect.prefixes(bare)]
    if not found and config is not None and config.fallback is not None and HuggingFace in tried:
        found = [(HuggingFace, prefix) for prefix in HuggingFace.prefixes_of(config, bare)]
    if len(found) == 1:
        dialect, prefix = found[0]
        return dialect(bare, prefix)
    if found:
        places = ", ".join(f"{dialect.name} below {prefix!r}" for dialect, prefix in found)
        kinds = sorted({dialect.name for dialect, _ in found})
        advice = f"choose by model.dialect={' or '.join(kinds)}" if len(kinds) > 1 else "name one as `prefix` in a model.dialect file"
        raise ValueError(f"several models in one checkpoint ({places}); {advice}")
    example = ", ".join(sorted(bare)[:3]) or "no tensor at all"
    if wanted == "auto":
        expected = f"the names of {', '.join(dialect.name for dialect in tried)}; model.dialect=FILE.yaml can describe others"
    else:
        expected = " or ".join(f"{embedding} and {witness}" for embedding, witness in tried[0].landmarks()) + f" ({tried[0].name})"
    raise ValueError(f"no known model in this checkpoint: it has {example}; looked for {expected}")

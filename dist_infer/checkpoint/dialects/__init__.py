"""Dialects: what each trainer's weight names and row orders mean."""

from __future__ import annotations

from collections.abc import Collection

from dist_infer.checkpoint.dialects.dialect import Dialect
from dist_infer.checkpoint.dialects.huggingface import HuggingFace
from dist_infer.checkpoint.dialects.kempnerforge import KempnerForge
from dist_infer.checkpoint.dialects.torchtitan import Torchtitan

__all__ = ["DIALECTS", "Dialect", "find_dialect"]

DIALECTS: tuple[type[Dialect], ...] = (HuggingFace, KempnerForge, Torchtitan)


def find_dialect(names: Collection[str], wanted: str = "auto") -> Dialect:
    """The dialect in which `names`, those of a checkpoint's tensors, are written.

    Args:
        names: Names of the stored tensors.
        wanted: A dialect's name, or "auto" to find the one whose weights are there.

    Raises:
        ValueError: No dialect fits, more than one does, or there are several models in the checkpoint.
    """
    if wanted not in ("auto", *(dialect.name for dialect in DIALECTS)):
        raise ValueError(f"model.dialect={wanted!r}: must be auto, {', '.join(dialect.name for dialect in DIALECTS)}")
    tried = [dialect for dialect in DIALECTS if wanted in ("auto", dialect.name)]
    found = [(dialect, prefix) for dialect in tried for prefix in dialect.prefixes(names)]
    if len(found) == 1:
        dialect, prefix = found[0]
        return dialect(names, prefix)
    if found:
        places = ", ".join(f"{dialect.name} below {prefix!r}" for dialect, prefix in found)
        raise ValueError(f"several models in one checkpoint ({places}); keep one, or give model.dialect if that tells them apart")
    expected = " or ".join(f"{dialect.embedding} and {dialect.witness} ({dialect.name})" for dialect in tried)
    example = ", ".join(sorted(names)[:3]) or "no tensor at all"
    raise ValueError(f"no known model in this checkpoint: it has {example}; looked for {expected}")

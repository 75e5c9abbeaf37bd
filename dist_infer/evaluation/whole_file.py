"""A file that is there whole or not at all, whoever else writes it at the same time."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from pathlib import Path

HALF_CHARACTERS = "backslashreplace"  # half a character, which JSON can spell, is written as JSON's escape for it


def write_whole(path: Path, parts: Iterable[str]) -> None:
    """Write `parts`, as UTF-8, to a file of this process's own that then takes the name `path`.

    Raises:
        OSError: It cannot be written; nothing is left of it, and what was at `path` is still there.
    """
    whole = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.new")
    try:
        with open(whole, "w", encoding="utf-8", errors=HALF_CHARACTERS) as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(whole, path)
    except OSError:
        whole.unlink(missing_ok=True)
        raise

"""Benchmarks that are programs of their own, run within a comparison."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def choices(rounds: int, quick: bool) -> dict[str, list[float]]:
    """Seconds of lm_eval's own `hf` model and ours on shared-prefix multiple choice.

    Raises:
        subprocess.CalledProcessError: It failed, or choices were wrong.
    """
    size = ["--questions", "3", "--layers", "2", "--context", "30"] if quick else ["--questions", "30"]
    found = _run("harness.py", ["--rounds", str(rounds), "--batch-sizes", "1", "--tp", "1", *size])
    names = {"hf batch_size=1": "hf", "dist_infer tp=1": "ours tp=1"}
    return {names[record["side"]]: record["seconds"] for record in found["records"]}


def load(rounds: int, quick: bool) -> dict[str, list[float]]:
    """Seconds of loading into given memory, by side and ranks.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    found = _run("load.py", ["--rounds", str(rounds), "--layers", "2" if quick else "12", "--ranks", *(("1",) if quick else ("1", "4"))])
    return {f"{record['side']}, {record['ranks']} ranks": [figures["again"] for figures in record["rounds"]] for record in found["records"]}


def _run(name: str, arguments: list[str]) -> dict[str, Any]:
    """What a benchmark wrote; its output goes to ours."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "figures.json")
        subprocess.run([sys.executable, str(HERE / name), *arguments, "--json", str(file)], check=True)
        return json.loads(file.read_text())

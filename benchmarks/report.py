"""What a comparison prints and writes."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from figures import Figure, Measured, Ratio


def about(options: Mapping[str, Any], peers: Mapping[str, str]) -> dict[str, Any]:
    """What a run was made with."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peers": dict(peers),
        "options": {name: value if isinstance(value, int | float | list | None) else str(value) for name, value in options.items()},
    }


def print_workload(
    name: str, unit: str, values: Mapping[str, list[float]], checks: Mapping[str, Mapping[str, int]], more_is_better: bool | None
) -> None:
    """The median and spread of every label, how much better the first is than each other, and how its tokens compare with float32."""
    print(f"\n{name}, {unit}")
    reference = next(iter(values), "")
    for label, found in values.items():
        better = ""
        if label != reference and more_is_better is not None:
            better = str(Ratio.of(values[reference], found) if more_is_better else Ratio.of(found, values[reference]))
        checked, truth = checks.get(label), ""
        if checked is not None:
            truth = f"{checked['agree']}/{checked['tokens']} agree, {checked['wrong']} of {checked['clear']} clear ones wrong"
        spread = f"{median(found):>10,.2f} ({min(found):,.2f} to {max(found):,.2f})"
        print(f"  {label:>32} {spread:<42} {better:<24} {truth}".rstrip(), flush=True)


def print_figures(judged: list[Figure]) -> None:
    """Asked, reached, and whether that is enough; the spread is that of the rounds."""
    print(f"\n{'figure':<52} {'asked':>12} {'reached (least to most)':>28}")
    for figure in judged:
        bound = f"{'at least' if figure.at_least else 'at most'} {figure.asked:.3g}"
        reached = "not measured" if figure.reached is None else str(figure.reached)
        met = {None: "", True: "yes", False: "no"}[figure.met]
        print(f"{figure.name:<52} {bound:>12} {reached:>28}  {met}")


def write(
    file: Path, about: dict[str, Any], measured: Measured, checks: Mapping[str, Any], judged: list[Figure], failed: Mapping[str, str]
) -> None:
    """All of it as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    lines = [{**asdict(figure), "met": figure.met} for figure in judged]
    partial.write_text(json.dumps({**about, "failed": failed, "measured": measured, "checks": checks, "figures": lines}, indent=2) + "\n")
    os.replace(partial, file)

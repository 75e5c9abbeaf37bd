"""Who takes part: ours in several ways, transformers, vLLM where it is installed, and the machine's limit."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from side import Side

HERE = Path(__file__).parent
KV_CACHE_TOKENS = 40_960  # more than any workload needs
MAX_BATCH_TOKENS = 4096  # of a step; the same for ours and vLLM
FEATURES_OFF = ["parallel.tp=1", "engine.prefix_cache=false", "engine.chunked_prefill=false"]

OURS = {
    "ours tp=1": ["parallel.tp=1"],
    "ours tp=2": ["parallel.tp=2"],
    "ours fsdp=2": ["parallel.fsdp=2", "parallel.tp=1"],
    "ours replicas=2": ["parallel.replicas=2", "parallel.tp=1"],
    "ours, features off": [*FEATURES_OFF],
    "ours, features off again": [*FEATURES_OFF],  # what two processes that do the same differ by
}


class Peers:
    """The sides of a run, each started when it is first asked for.

    Args:
        model: Directory of the model, as `write_model` makes it.
        kv_bytes: Of a token in its KV cache.
        device: "cpu" or "cuda".
        vllm: The Python that has vLLM; None without it.
        directory: For logs.
        first: What a side is asked as soon as it runs.
        warm: What it is asked before anything is measured, so that code paths have been used once.
        fill: What a side that keeps a KV cache is asked then, to have written most of it once, for fresh memory may cost its host seconds
            a GB; None for nothing.
    """

    def __init__(
        self,
        model: Path,
        kv_bytes: int,
        device: str,
        vllm: Path | None,
        directory: Path,
        first: dict[str, Any],
        warm: dict[str, Any],
        fill: dict[str, Any] | None,
    ) -> None:
        self.kv_gib = math.ceil(KV_CACHE_TOKENS * kv_bytes / 2**30)
        self.model, self.device, self.vllm, self.directory = model, device, vllm, directory
        self.first, self.warm, self.fill = first, warm, fill
        self._running: dict[str, Side] = {}

    def side(self, name: str) -> Side:
        """The side of this name, running and warm; the same as long as it is not let go of.

        Raises:
            SideFailed: It cannot be started.
        """
        if name not in self._running:
            side = self._running[name] = self.new(name)
            side.start()
            if side.first is not None:
                side.ask(**self.warm)
                if self.fill is not None and name != "transformers":
                    side.ask(**self.fill)
        return self._running[name]

    def new(self, name: str) -> Side:
        """A side that this run does not share."""
        log = self.directory / f"{name.replace(' ', '_')}.log"
        if name == "bandwidth":
            return Side([sys.executable, str(HERE / "serve_bandwidth.py"), self.device], {}, log, None)
        if name == "transformers":
            command = [sys.executable, str(HERE / "serve_transformers.py"), str(self.model / "safetensors"), self.device]
            return Side(command, {}, log, self.first)
        if name in OURS:
            overrides = [f"model.path={self.model / 'dcp'}", "model.tokenizer=none", f"device={self.device}"]
            overrides += [f"engine.kv_cache_gib={self.kv_gib}", f"engine.max_batch_tokens={MAX_BATCH_TOKENS}", *OURS[name]]
            return Side([sys.executable, str(HERE / "serve_ours.py"), json.dumps(overrides)], {}, log, self.first)
        assert name.startswith("vLLM tp=") and self.vllm is not None
        tp = int(name.removeprefix("vLLM tp="))
        command = [
            str(self.vllm),
            str(HERE / "serve_vllm.py"),
            str(self.model / "safetensors"),
            str(tp),
            self.device,
            str(MAX_BATCH_TOKENS),
        ]
        return Side(command, _vllm_environment(self.device, tp, self.kv_gib), log, self.first)

    def let_go(self, name: str) -> None:
        """End a side, if it runs."""
        side = self._running.pop(name, None)
        if side is not None:
            side.close()

    def close(self) -> None:
        """End all."""
        for name in list(self._running):
            self.let_go(name)


def find_vllm(given: str | None) -> tuple[Path | None, str]:
    """The Python that has vLLM, `given` or from VLLM_PYTHON, and its version; without one, None and the reason."""
    wanted = given or os.environ.get("VLLM_PYTHON")
    if not wanted:
        return None, "not asked for: give --vllm PYTHON, or set VLLM_PYTHON, to a Python that has vllm"
    python = shutil.which(wanted)
    if python is None:
        return None, f"{wanted}: no such program"
    ask = "from importlib.metadata import distributions as d; print(*(f'{x.name} {x.version}' for x in d() if x.name.startswith('vllm')))"
    found = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False).stdout.strip()
    return (Path(python), found) if found else (None, f"{python} has no vllm")


def _vllm_environment(device: str, tp: int, kv_gib: int) -> dict[str, str]:
    """Its cores, cut evenly over its ranks, and its KV cache."""
    if device != "cpu":
        return {}
    cores = sorted(os.sched_getaffinity(0))
    cuts = [cores[rank * len(cores) // tp : (rank + 1) * len(cores) // tp] for rank in range(tp)]
    ranges = "|".join(",".join(map(str, cut)) for cut in cuts)
    return {"VLLM_CPU_OMP_THREADS_BIND": ranges, "VLLM_CPU_KVCACHE_SPACE": str(kv_gib)}

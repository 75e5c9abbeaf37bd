"""`dist-infer env`: what a bug report needs to know of this machine, this job and this checkpoint."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import socket
import subprocess
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch.cuda.nccl import version as nccl_version

from dist_infer.checkpoint.checkpoint import open_checkpoint
from dist_infer.cli.arguments import parse
from dist_infer.cli.units import in_units
from dist_infer.config.options import Options
from dist_infer.distributed.launch import RankVariables
from dist_infer.distributed.mesh import choose_mesh
from dist_infer.engine.blueprint import Blueprint
from dist_infer.engine.memory import free_bytes
from dist_infer.model.native import kernels

WIDTH, LABEL = 100, 12
TIED = "\xa0"  # a space at which no line is broken
PACKAGES = ("dist_infer", "torch", "transformers", "safetensors", "numpy", "omegaconf", "tokenizers", "lm_eval", "datasets", "matplotlib")
# Flags that decide which kernels run, and how fast.
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "sve")
# Only what is named here is printed: others may hold secrets.
VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_USE_AGENT_STORE"),
    *("TORCHELASTIC_SIGNALS_TO_HANDLE", "TORCH_CPP_LOG_LEVEL", "TORCH_NCCL_ASYNC_ERROR_HANDLING"),
    *("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_PARTITION", "SLURM_JOB_NUM_NODES", "SLURM_JOB_NODELIST", "SLURM_ARRAY_TASK_ID"),
    *("SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE"),
    *("SLURM_NODEID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "SLURM_GPUS_ON_NODE"),
    *("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_RESTART_COUNT"),
    *("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "CUDA_HOME"),
    *("NCCL_SOCKET_IFNAME", "NCCL_DEBUG", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE"),
    *("GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CXX", "HF_HOME", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TMPDIR"),
)  # fmt: skip


def run(arguments: Sequence[str]) -> int:
    """Run the command; it starts no ranks, and of several only rank 0 prints. Without model.path it says nothing of a checkpoint."""
    options = parse(arguments)
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        return 0
    for name, lines in (("versions", _versions()), ("devices", _devices()), ("job", _job(options))):
        _show(name, lines)
    if options.model.path is not None:
        _show("checkpoint", _checkpoint(options))
    return 0


def _show(section: str, lines: Iterable[tuple[str, str]]) -> None:
    print(f"{section}")
    for label, text in lines:
        indent = " " * (LABEL + 4)
        wrapped = textwrap.fill(
            text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
        )
        print(f"  {label:<{LABEL}}  {wrapped[len(indent) :].replace(TIED, ' ')}")


def _versions() -> Iterable[tuple[str, str]]:
    packages = [f"{name}{TIED}{version}" for name in PACKAGES if (version := _version(name)) is not None]
    absent = [name for name in PACKAGES if _version(name) is None]
    yield "packages", ", ".join(packages) + (f"; not installed: {', '.join(absent)}" if absent else "")
    yield "python", f"{platform.python_version()} ({platform.python_implementation()})"
    release = _os_release()
    yield "system", f"{release}, kernel {platform.release()}, {' '.join(platform.libc_ver())}".rstrip(", ")
    yield "compiler", _compiler()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _os_release() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _compiler() -> str:
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not there; eager operations run in place of compiled kernels"
    try:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]} does not run: {error}"
    return (done.stdout or done.stderr).partition("\n")[0]


def _devices() -> Iterable[tuple[str, str]]:
    model, flags = _processor()
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield "CPU", f"{model}, {allowed} of {os.cpu_count()} cores may be used; {' '.join(flags) or 'no vector extensions known here'}"
    yield "memory", f"{in_units(free_bytes(torch.device('cpu'), 1))} free for a rank that is alone"
    ours = [name for name in ("float32", "bfloat16") if kernels(getattr(torch, name)) is not None]
    yield "kernels", f"compiled for {', '.join(ours)}" if ours else "not compiled; eager operations run"
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        yield "GPUs", f"none found; {built}"
        return
    found = Counter(_gpu(index) for index in range(torch.cuda.device_count()))
    yield "GPUs", "; ".join(f"{count} x {name}" for name, count in found.items())
    nccl = ".".join(map(str, nccl_version())) if torch.distributed.is_nccl_available() else "not built in"
    yield "CUDA", f"{torch.version.cuda}, driver {_driver()}, NCCL {nccl}"


def _processor() -> tuple[str, list[str]]:
    """Its name, and which of `FLAGS` it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), []
    pairs = [(name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    model = next((value for name, value in pairs if name == "model name"), platform.machine())
    words = next((value.split() for name, value in pairs if name in ("flags", "Features")), [])
    return model, [flag for flag in FLAGS if flag in words]


def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name} {in_units(properties.total_memory)}, compute capability {properties.major}.{properties.minor}"


def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text().partition("\n")[0].removeprefix("NVRM version:").strip()
    except OSError:
        return "unknown"


def _job(options: Options) -> Iterable[tuple[str, str]]:
    yield "host", f"{platform.node()}, network interfaces {', '.join(name for _, name in socket.if_nameindex())}"
    try:
        variables = RankVariables.read()
        by = f"by {variables.launcher}, {variables.world_size} ranks, {variables.local_world_size} on this host" if variables else "alone"
        yield "started", by
        if options.model.path is None:
            yield "mesh", f"{_mesh(options, None)}; a model's heads and size may change this"
    except ValueError as error:
        yield "started", f"wrongly: {error}"
    found = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    yield "variables", "  ".join(found) or "none of a launcher, SLURM, CUDA, NCCL or gloo is set"


def _mesh(options: Options, blueprint: Blueprint | None) -> str:
    """The mesh that a run with these options would choose here, and why."""
    variables = RankVariables.read()
    size, per_node = (variables.world_size, variables.local_world_size) if variables else (None, 1)
    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    sharing = -(-per_node // torch.cuda.device_count()) if on_gpu else per_node
    _, why = choose_mesh(
        options.parallel,
        size,
        per_node,
        heads=blueprint.config.heads if blueprint else None,
        model_bytes=blueprint.parameters * blueprint.dtype.itemsize if blueprint else None,
        free_bytes_per_rank=free_bytes(torch.device("cuda" if on_gpu else "cpu"), sharing),
        accelerators=torch.cuda.device_count() if on_gpu else 0,
    )
    return why


def _checkpoint(options: Options) -> Iterable[tuple[str, str]]:
    assert options.model.path is not None
    checkpoint = open_checkpoint(options.model.path, options.model.dialect, options.model.step, options.model.config)
    yield "path", f"{checkpoint.path}{f' ({checkpoint.note})' if checkpoint.note else ''}"
    yield "identity", checkpoint.identity
    dtypes = Counter(entry.dtype for entry in checkpoint.index.values())
    tensors = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    yield "format", f"source {checkpoint.source.kind}, dialect {checkpoint.dialect.name}, tensors: {tensors}"
    config = checkpoint.config(options.model.config)
    yield (
        "model",
        f"{config.family}: {config.layers} layers, hidden {config.hidden_size}, ffn {config.ffn_size}, {config.heads} heads over "
        f"{config.kv_heads} of {config.head_dim}, vocabulary {config.vocab_size}, up to {config.longest:,} tokens",
    )
    try:
        checkpoint.match(config)
        yield "match", "every weight of the model is there, in shape, and nothing else"
        yield "mesh", _mesh(options, Blueprint.around(options, config, checkpoint))
    except ValueError as error:
        yield "match", f"no: {error}"
    yield "tokenizer", str(checkpoint.tokenizer_directory() or "none found")

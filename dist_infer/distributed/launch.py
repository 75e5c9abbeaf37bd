"""Who this process is among the ranks, and how the other ranks of one machine are started."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dist_infer.distributed.logs import console_descriptor

STARTED_BY = "DIST_INFER_STARTED_BY"  # set for ranks that rank 0 started itself: rank 0's pid
FIRST_RESERVED_STEP = 0xFFFFFFF0  # SLURM numbers its batch, extern and interactive steps from the top
FIRST_PORT, PORTS = 15000, 16000  # below the range the kernel hands out by itself


@dataclass(frozen=True)
class RankVariables:
    """What a launcher tells a rank through its environment.

    Attributes:
        rank, world_size: This rank and how many there are.
        local_rank, local_world_size: The same on this node.
        master_addr, master_port: Where the ranks meet.
        launcher: torchrun, srun, or local when rank 0 started this process itself.
        agent_store: The launcher itself serves the store at that address.
        attempt: How often the launcher has started this world over.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    launcher: str = "torchrun"
    agent_store: bool = False
    attempt: int = 0

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> RankVariables | None:
        """From torchrun's or srun's variables; None for a process that was started alone.

        Raises:
            ValueError: A variable is missing or is no number.
        """
        environ = os.environ if environ is None else environ
        if "RANK" in environ and "WORLD_SIZE" in environ:
            return cls._read_torchrun(environ)
        if _is_srun_rank(environ):
            return cls._read_srun(environ)
        return None

    @classmethod
    def _read_torchrun(cls, environ: Mapping[str, str]) -> RankVariables:
        rank, world_size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
        if not 0 <= rank < world_size:
            raise ValueError(f"RANK={rank}: must be at least 0 and less than WORLD_SIZE={world_size}")
        if world_size > 1 and not (environ.get("MASTER_ADDR") and environ.get("MASTER_PORT")):
            raise ValueError(f"WORLD_SIZE={world_size} but MASTER_ADDR or MASTER_PORT is not set; start the ranks with torchrun or srun")
        return cls(
            rank=rank,
            world_size=world_size,
            local_rank=_number(environ, "LOCAL_RANK", rank),
            local_world_size=_number(environ, "LOCAL_WORLD_SIZE", world_size),
            master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
            master_port=_number(environ, "MASTER_PORT", 0),
            launcher="local" if STARTED_BY in environ else "torchrun",
            agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=_number(environ, "TORCHELASTIC_RESTART_COUNT", 0),
        )

    @classmethod
    def _read_srun(cls, environ: Mapping[str, str]) -> RankVariables:
        world_size = _number(environ, "SLURM_NTASKS")
        nodes = expand_nodes(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "127.0.0.1")
        node = _number(environ, "SLURM_NODEID", 0)
        per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
        counts = expand_counts(per_node) if per_node else []
        local = counts[node] if node < len(counts) else _number(environ, "SLURM_NTASKS_PER_NODE", max(1, world_size // len(nodes)))
        job, step = _number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID")
        attempt = _number(environ, "SLURM_RESTART_COUNT", 0)
        return cls(
            rank=_number(environ, "SLURM_PROCID"),
            world_size=world_size,
            local_rank=_number(environ, "SLURM_LOCALID", 0),
            local_world_size=local,
            master_addr=environ.get("MASTER_ADDR") or nodes[0],
            master_port=_number(environ, "MASTER_PORT", FIRST_PORT + (job * 31 + step * 7 + attempt) % PORTS),
            launcher="srun",
            attempt=attempt,
        )


def _is_srun_rank(environ: Mapping[str, str]) -> bool:
    """Whether srun started several tasks, of which this is one; not so in a batch script or an interactive shell."""
    step, tasks = environ.get("SLURM_STEP_ID", ""), environ.get("SLURM_NTASKS", "")
    numbers = all(value.isdecimal() for value in (step, tasks, environ.get("SLURM_PROCID", "")))
    return numbers and int(step) < FIRST_RESERVED_STEP and int(tasks) > 1


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None or text == "":
        if default is None:
            raise ValueError(f"environment variable {name} is not set, though others of the launcher are; use torchrun or srun")
        return default
    if not text.isdecimal():
        raise ValueError(f"environment variable {name}={text!r}: must be a whole number")
    return int(text)


def expand_nodes(nodelist: str) -> list[str]:
    """The hosts of a SLURM node list: `a[1-3,05],b` is a1, a2, a3, a05, b."""
    hosts = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        names = [""]
        for text, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", item):
            tails = [text] if text else _expand_ranges(ranges)
            names = [name + tail for name in names for tail in tails]
        hosts += names
    return hosts


def _expand_ranges(ranges: str) -> list[str]:
    """`1-3,05` is 1, 2, 3, 05; leading zeros are kept."""
    numbers = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    return numbers


def expand_counts(counts: str) -> list[int]:
    """Tasks of each node from SLURM's short form: `2(x3),1` is 2, 2, 2, 1."""
    expanded = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ValueError(f"SLURM_TASKS_PER_NODE={counts!r}: must look like 2(x3),1")
        expanded += [int(match[1])] * int(match[2] or 1)
    return expanded


# Runs before the rank's program: die with the parent (checked again, it may be gone already), and leave Ctrl-C to rank 0.
# A program of its own, because code between fork and exec is not safe in a parent that has threads.
LAUNCH = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]): sys.exit(1)
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def survive_parent_thread() -> None:
    """Give up the parent-death signal once the watchdog watches the parent, so that it can say who died.

    The signal would also come when only the parent's thread that started us ends, as threads of notebooks do.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)


class LocalRanks:
    """Ranks 1... of this machine, started by this process, which is rank 0."""

    def __init__(self, processes: dict[int, subprocess.Popen[bytes]]) -> None:
        """Take charge of `processes`, by rank."""
        self._processes = processes

    def poll(self) -> dict[int, int]:
        """Exit codes of the ranks that have ended (negative: the signal that killed them)."""
        return {rank: process.returncode for rank, process in self._processes.items() if process.poll() is not None}

    def stop(self, grace_s: float = 3.0) -> None:
        """Wait until all have ended; those that are still there after `grace_s` are killed."""
        deadline = time.monotonic() + grace_s
        for process in self._processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def start_local_ranks(world_size: int, command: Sequence[str], port: int, environment: Mapping[str, str] | None = None) -> LocalRanks:
    """Start ranks 1...world_size-1 of a world whose rank 0 is this process and serves the store at `port`.

    Args:
        world_size: Ranks in all, this one included.
        command: Program and arguments.
        port: Where this process serves the store, on 127.0.0.1.
        environment: Variables to set besides the launcher's.
    """
    shared = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    shared.setdefault("OMP_NUM_THREADS", str(threads_per_rank(world_size)))
    shared.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # c10d's stack traces when rank 0 is gone would hide the reason
    shared |= environment or {}
    shared |= {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        STARTED_BY: str(os.getpid()),
    }
    wrapped = [sys.executable, "-I", "-S", "-c", LAUNCH, str(os.getpid()), *command] if sys.platform == "linux" else list(command)
    processes: dict[int, subprocess.Popen[bytes]] = {}
    try:
        for rank in range(1, world_size):
            variables = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # What a worker prints must not mix with rank 0's results, nor go to rank 0's log file.
            to = console_descriptor()
            processes[rank] = subprocess.Popen(wrapped, env=variables, stdin=subprocess.DEVNULL, stdout=to, stderr=to)
    except BaseException:
        LocalRanks(processes).stop(0.0)
        raise
    return LocalRanks(processes)


def attempt() -> int:
    """Which start of its job this is: SLURM counts how often it has queued a job again."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) + 1


def threads_per_rank(ranks: int) -> int:
    """Compute threads for each of `ranks` on the cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks)


def ending(code: int) -> str:
    """An exit code in words: `was killed by SIGKILL`, `exited with code 3`."""
    if code >= 0:
        return f"exited with code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"

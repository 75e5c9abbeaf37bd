"""Where a rank runs, as far as other ranks need to know."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Host:
    """The place of one rank.

    Attributes:
        name: Host name, for messages.
        boot_id: The same for all processes of one running kernel.
        pid_namespace: Processes see each other's pids only inside one.
        pid: Process id.
        machine: Processor family.
        gpu: Identity of the GPU the rank computes on; None on CPU.
    """

    name: str
    boot_id: str
    pid_namespace: str
    pid: int
    machine: str
    gpu: str | None

    @classmethod
    def here(cls, device: torch.device) -> Host:
        """This process, computing on `device`."""
        gpu = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
        try:
            boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            pid_namespace = os.readlink("/proc/self/ns/pid")
        except OSError:  # no Linux
            boot_id, pid_namespace = platform.node(), ""
        return cls(platform.node(), boot_id, pid_namespace, os.getpid(), platform.machine(), gpu)

    def sees(self, other: Host) -> bool:
        """Whether `other`'s pid means the same process here."""
        return bool(self.pid_namespace) and (self.boot_id, self.pid_namespace) == (other.boot_id, other.pid_namespace)

    def __str__(self) -> str:
        """For messages."""
        return f"host {self.name}, pid {self.pid}"

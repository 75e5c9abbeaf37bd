"""Two hosts, each with its own address, name and processes, and a cable between them. Needs root and network namespaces."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

PROGRAM = Path(__file__).with_name("alone.py")
HEARTBEAT_S = 2
PORT = 29500  # each host has all ports for itself


def ip(*arguments: str) -> None:
    """Run `ip`."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def missing() -> str | None:
    """Why there can be no hosts here; None if there can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return "needs root, ip and unshare"
    name = f"probe{secrets.token_hex(3)}"
    try:
        ip("netns", "add", name)
        try:
            ip("link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b")
            ip("link", "del", f"{name}a")
            subprocess.run(["unshare", "--uts", "--pid", "--fork", "--mount-proc", "true"], check=True, capture_output=True)
        finally:
            ip("netns", "del", name)
    except subprocess.CalledProcessError as error:
        return f"namespaces are refused here: {error.stderr.decode().strip()}"
    return None


class Hosts:
    """Hosts `near` with ranks 0 and 1, and `far` with rank 2."""

    RANKS: ClassVar = {"near": (0, 1), "far": (2,)}

    def __init__(self, directory: Path) -> None:
        """Make the network; nothing runs yet."""
        self.directory, token = directory, secrets.token_hex(3)
        subnet = f"192.168.{secrets.randbelow(200) + 20}"
        self.networks = {name: f"{name}{token}" for name in self.RANKS}
        self.address = f"{subnet}.1"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for network in self.networks.values():
            ip("netns", "add", network)
        near, far = self.networks.values()
        ip("link", "add", "wire", "netns", near, "type", "veth", "peer", "name", "wire", "netns", far)
        for last, network in enumerate(self.networks.values(), 1):
            ip("-n", network, "address", "add", f"{subnet}.{last}/24", "dev", "wire")
            ip("-n", network, "link", "set", "lo", "up")
            ip("-n", network, "link", "set", "wire", "up")

    def start(self) -> None:
        """Start the ranks, and wait until they have met."""
        for host, ranks in self.RANKS.items():
            lines = [f"hostname {host}"]
            for local, rank in enumerate(ranks):
                program = f"{sys.executable} {PROGRAM} loop {HEARTBEAT_S} > {rank}.out 2> {rank}.err"
                lines.append(f"(RANK={rank} LOCAL_RANK={local} LOCAL_WORLD_SIZE={len(ranks)} {program}; echo $? > {rank}.code) &")
            alone = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", "\n".join([*lines, "wait"])]
            environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_"))}
            environ |= {"WORLD_SIZE": "3", "MASTER_ADDR": self.address, "MASTER_PORT": str(PORT), "GLOO_SOCKET_IFNAME": "wire"}
            environ |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONPATH": str(PROGRAM.parents[2])}
            command = ["ip", "netns", "exec", self.networks[host], *alone]
            self.processes[host] = subprocess.Popen(command, env=environ, cwd=self.directory)
        self.await_condition(lambda: b"total" in self.read(0, "out"), 60)

    def await_condition(self, holds, limit_s: float) -> None:  # type: ignore[no-untyped-def]
        """Until `holds()`."""
        deadline = time.monotonic() + limit_s
        while not holds():
            errors = [self.read(rank, "err").decode() for rank in range(3)]
            assert time.monotonic() < deadline, errors
            time.sleep(0.05)

    def read(self, rank: int, what: str) -> bytes:
        """What a rank wrote."""
        path = self.directory / f"{rank}.{what}"
        return path.read_bytes() if path.exists() else b""

    def exit_codes(self) -> list[int]:
        """Of all ranks, which have a time-out, a grace and something more to end."""
        self.await_condition(lambda: all(self.read(rank, "code").strip() for rank in range(3)), HEARTBEAT_S + 25)
        return [int(self.read(rank, "code")) for rank in range(3)]

    def last_line(self, rank: int) -> str:
        """The last line of a rank's standard error."""
        return self.read(rank, "err").decode().splitlines()[-1]

    def pid(self, rank: int) -> int:
        """A rank's process, as seen from here."""
        token = f"RANK={rank}".encode()
        place = f"MASTER_ADDR={self.address}".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
                program = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if token in variables and place in variables and str(PROGRAM).encode() in program.split(b"\0"):
                return int(entry.name)
        raise AssertionError(f"rank {rank} does not run")

    def unplug(self) -> None:
        """Pull the cable: nobody is told, packets vanish."""
        ip("-n", self.networks["far"], "link", "set", "wire", "down")

    def power_cut(self, host: str) -> None:
        """End everything on a host without a word to anyone."""
        self.unplug()
        self.processes[host].kill()

    def close(self) -> None:
        """End all processes and the network."""
        for process in self.processes.values():
            process.kill()
            process.wait()
        for network in self.networks.values():
            ip("netns", "del", network)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Two hosts whose ranks work together."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    made = Hosts(tmp_path)
    try:
        made.start()
        yield made
    finally:
        made.close()


def test_both_sides_of_a_pulled_cable_end(hosts: Hosts) -> None:
    hosts.unplug()
    assert hosts.exit_codes() == [1, 1, 1]
    assert "rank 2 (host far, pid" in hosts.last_line(0) and f"was silent for {HEARTBEAT_S} s" in hosts.last_line(0)
    assert "rank 0 (host near, pid" in hosts.last_line(2) and f"cannot be reached for {HEARTBEAT_S} s" in hosts.last_line(2)


def test_a_stopped_rank_0_that_serves_the_store_holds_nobody(hosts: Hosts) -> None:
    os.kill(hosts.pid(0), signal.SIGSTOP)
    assert hosts.exit_codes() == [128 + signal.SIGKILL, 1, 1]
    assert "rank 0 (host near, pid" in hosts.last_line(1) and "was stopped" in hosts.last_line(1)
    assert "rank 0 (host near, pid" in hosts.last_line(2)  # mute, or gone when rank 1 has ended it


def test_a_host_without_power_is_named(hosts: Hosts) -> None:
    hosts.power_cut("far")
    hosts.await_condition(lambda: all(hosts.read(rank, "code").strip() for rank in (0, 1)), HEARTBEAT_S + 25)
    assert "rank 2 (host far, pid" in hosts.last_line(0) and "silent" in hosts.last_line(0)

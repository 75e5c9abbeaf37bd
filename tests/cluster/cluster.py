"""A real SLURM cluster on this machine: hosts made of namespaces, with names, addresses, processes and cables of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parent
PROGRAMS = ("sbatch", "slurmd", "slurmctld", "munged", "ip", "nsenter", "setpriv", "unshare")
NAMESPACES = ("--net", "--uts", "--mount", "--ipc", "--pid")
MORTAL = ("setpriv", "--pdeathsig", "KILL")  # dies with the thread that starts it, however that ends
NETWORK = "10.77.0"  # inside the cluster's own namespaces: any number of clusters may have it
CONTROL = 254


def missing() -> str | None:
    """Why there can be no cluster here, or None."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (tests/cluster/install.sh)"
    if os.geteuid() != 0:
        return "hosts are made of namespaces, which needs root"
    made = subprocess.run(["unshare", *NAMESPACES, "--fork", "--mount-proc", "true"], capture_output=True, text=True)
    return f"namespaces cannot be made here: {made.stderr.strip()}" if made.returncode else None


def until(condition: Callable[[], bool], limit_s: float, what: str) -> None:
    """Wait for `condition`, asking ten times a second.

    Raises:
        TimeoutError: It did not come true within `limit_s`.
    """
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {limit_s:g} s")
        time.sleep(0.1)


class Host:
    """One machine of the cluster, on from its making until `cut`.

    Args:
        directory: The cluster's.
        number: Last part of its address; `CONTROL` is the login host, which the nodes live inside.
        control: The login host, for a node.
    """

    def __init__(self, directory: Path, number: int, control: Host | None = None) -> None:
        self.name = "control" if control is None else f"node{number}"
        self.address = f"{NETWORK}.{number}"
        (directory / "boot").mkdir(exist_ok=True)
        (directory / "boot" / self.name).write_text(f"{uuid.uuid4()}\n")
        role = "control" if control is None else "node"
        inside = [] if control is None else control.enter()
        init = [str(HERE / "host.sh"), role, str(directory), self.name, self.address]
        self._process = subprocess.Popen(
            [*MORTAL, *inside, "unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", *init],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(directory / "log" / f"{self.name}.err").open("a"),
            env={**os.environ, "SLURM_CONF": str(directory / "slurm.conf")},
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line == "ready\n", f"{self.name}: {(directory / 'log' / f'{self.name}.err').read_text()}"
        self.pid = _last_descendant(self._process.pid)
        """Of its PID 1, as seen from here."""

    @property
    def lives(self) -> bool:
        """Whether it has power."""
        return self._process.poll() is None

    def go(self) -> None:
        """Start its daemons: its network is there."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def enter(self, *command: str) -> list[str]:
        """The command line that runs `command` on this host."""
        return ["nsenter", "--target", str(self.pid), *NAMESPACES, "--wd=" + os.getcwd(), "--", *command]

    def cut(self) -> None:
        """Power-cut: everything on it dies at once."""
        os.kill(self.pid, 9)
        self._process.wait()


class Cluster:
    """A login host and some nodes.

    Attributes:
        directory: Its files, the same on all hosts, as every file is.
        small: A directory on a disk of 256 KiB; from here it is seen at `seen(small)`.
    """

    def __init__(self, nodes: int) -> None:
        """Start the cluster, and wait until all its nodes are idle."""
        self.directory = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # sockets need a short path
        self.directory.chmod(0o755)
        self.small = self.directory / "small"
        self._wires: dict[int, subprocess.Popen[str]] = {}
        self._configure(nodes)
        self.control = Host(self.directory, CONTROL)
        self.control.go()
        self.nodes: dict[int, Host] = {}
        try:
            for number in range(1, nodes + 1):
                self.boot(number)
            until(lambda: len(self._idle()) == nodes, 30.0, "nodes idle")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End every process of the cluster; its files go too."""
        self.control.cut()
        for wire in self._wires.values():
            wire.kill()
            wire.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def run(self, *command: str, environment: Mapping[str, str] | None = None, limit_s: float = 60.0) -> str:
        """What `command` prints on the login host; CalledProcessError when it fails."""
        variables = {**os.environ, **(environment or {}), "SLURM_CONF": str(self.directory / "slurm.conf")}
        done = subprocess.run(self.control.enter(*command), env=variables, capture_output=True, text=True, timeout=limit_s)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def seen(self, path: Path) -> Path:
        """Where a path of the hosts is seen from here, other mounts included."""
        return Path(f"/proc/{self.control.pid}/root") / path.relative_to("/")

    def boot(self, number: int) -> None:
        """Switch a node on, which is off."""
        node = Host(self.directory, number, self.control)
        self.nodes[number] = node
        self._network("ip", "link", "delete", f"cable{number}", check=False)
        self._network(
            *("ip", "link", "add", f"cable{number}", "type", "veth"),
            *("peer", "name", "eth0", "address", _mac(number), "netns", str(node.pid)),
        )
        self._network("ip", "link", "set", f"cable{number}", "master", "bridge0", "up")
        node.go()

    def cut(self, number: int) -> None:
        """Power-cut of a node."""
        self.nodes[number].cut()

    def unplug(self, number: int) -> None:
        """Pull a node's network cable."""
        self._network("ip", "link", "set", f"cable{number}", "down")

    def plug(self, number: int) -> None:
        """Put a node's network cable back."""
        self._network("ip", "link", "set", f"cable{number}", "up")

    def worsen(self, number: int, loss: float, delay_ms: float, jitter_ms: float) -> None:
        """Replace a node's cable by one that loses frames (as a part of 1) and delays them by `delay_ms` +- `jitter_ms`."""
        self._network("ip", "link", "delete", f"cable{number}")
        node = self.nodes[number]
        ends = [f"cable{number}", "bridge0", str(node.pid), _mac(number), f"{node.address}/24"]
        wire = [sys.executable, "-S", str(HERE / "wire.py"), *ends, str(loss), str(delay_ms), str(jitter_ms)]
        process = subprocess.Popen(
            [*MORTAL, "nsenter", "--target", str(self.control.pid), "--net", *wire],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        self._wires[number] = process

    def repair(self, number: int) -> None:
        """Give a node with a bad cable a good one, by starting it anew."""
        wire = self._wires.pop(number)
        wire.kill()
        wire.wait()
        self.cut(number)
        self.boot(number)

    def mend(self) -> None:
        """End all jobs, and see that every node is up and every cable in."""
        self.run("scancel", "--user=root")
        for number in list(self._wires):
            self.repair(number)
        for number, node in self.nodes.items():
            if not node.lives:
                self.boot(number)
            self.plug(number)
        names = [node.name for node in self.nodes.values()]
        until(lambda: not self.run("squeue", "-h"), 60.0, "no jobs left")
        until(lambda: self._idle() == names, 60.0, "nodes idle again")

    def logs(self) -> str:
        """The end of the daemons' logs, for whoever looks for the reason of a failure."""
        texts = [f"{path.name}:\n{path.read_text(errors='replace')[-3000:]}" for path in sorted((self.directory / "log").iterdir())]
        return "\n".join(texts)

    def _idle(self) -> list[str]:
        lines = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").splitlines()
        return sorted(name for name, state in map(str.split, lines) if state == "idle")

    def _network(self, *command: str, check: bool = True) -> None:
        subprocess.run(["nsenter", "--target", str(self.control.pid), "--net", *command], check=check, capture_output=True)

    def _configure(self, nodes: int) -> None:
        for name in ("state", "log", "run", "small", *(f"spool/node{number}" for number in range(1, nodes + 1))):
            (self.directory / name).mkdir(parents=True)
        key = self.directory / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        names = {"control": f"{NETWORK}.{CONTROL}"} | {f"node{number}": f"{NETWORK}.{number}" for number in range(1, nodes + 1)}
        # c10d's store asks for the names of IPv6 addresses too; one that is not here costs seconds.
        lines = [f"{prefix}{address} {name}\n" for name, address in names.items() for prefix in ("", "::ffff:")]
        (self.directory / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
        (self.directory / "nsswitch.conf").write_text("hosts: files\n")
        # slurmd wants a device file for each GPU; the programs find out that these are none.
        gpus = [self.directory / "gpu0", self.directory / "gpu1"]
        for gpu, null in zip(gpus, ("/dev/null", "/dev/zero"), strict=True):
            os.mknod(gpu, os.stat(null).st_mode, os.stat(null).st_rdev)
        files = f"{self.directory}/gpu[0-1]"
        (self.directory / "gres.conf").write_text(f"NodeName=node[1-{nodes}] Name=gpu File={files} Flags=nvidia_gpu_env\n")
        text = (HERE / "slurm.conf").read_text()
        (self.directory / "slurm.conf").write_text(text.replace("DIR", str(self.directory)).replace("NODES", str(nodes)))


class Job:
    """A job that was handed to `sbatch`.

    Args:
        cluster: Where.
        directory: Where it works; it gets the log files.
        command: Options, script and arguments of sbatch.
        environment: Variables besides this process's.
    """

    def __init__(self, cluster: Cluster, directory: Path, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.cluster, self.directory = cluster, directory
        self.id = cluster.run("sbatch", "--parsable", f"--chdir={directory}", *command, environment=environment).strip()

    def show(self) -> dict[str, str]:
        """What SLURM says of it: JobState, Restarts, BatchHost, ExitCode, ..."""
        words = self.cluster.run("scontrol", "show", "job", "--oneliner", self.id).splitlines()[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, limit_s: float, state: str = "COMPLETED") -> None:
        """Wait until it is in `state`; its log is in the error when it ends in another."""
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", state}
        try:
            until(lambda: self.show()["JobState"] in final, limit_s, f"job {self.id} {state}")
        except TimeoutError as error:
            raise TimeoutError(f"{error}; {self.show()}\n{self.log()}\n{self.cluster.logs()}") from None
        assert self.show()["JobState"] == state, f"{self.show()}\n{self.log()}"

    def log(self) -> str:
        """What it has printed; of an array, each of its tasks."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.directory.glob(f"*-{self.id}[._]*log")))

    def cancel(self, *options: str) -> None:
        """scancel it, or send it a signal."""
        self.cluster.run("scancel", *options, self.id)

    def pids(self, number: int) -> list[int]:
        """Its ranks on a node, in their order, as seen from here."""
        found: dict[int, int] = {}
        for process in _descendants(self.cluster.nodes[number].pid):
            try:
                pairs = [item.partition("=") for item in Path(f"/proc/{process}/environ").read_text(errors="replace").split("\0")]
                command = Path(f"/proc/{process}/cmdline").read_text(errors="replace").split("\0")
            except OSError:
                continue
            variables = {name: value for name, _, value in pairs}
            is_rank = variables.get("SLURM_JOB_ID") == self.id and variables.get("SLURM_STEP_ID") == "0" and "python" in command[0]
            if is_rank and "SLURM_PROCID" in variables:
                found.setdefault(int(variables["SLURM_PROCID"]), process)
        return [found[rank] for rank in sorted(found)]


def _descendants(pid: int) -> list[int]:
    """All processes below `pid`, parents first."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [process for child in children for process in (child, *_descendants(child))]


def _last_descendant(pid: int) -> int:
    return (pid, *_descendants(pid))[-1]


def _mac(number: int) -> str:
    return f"02:00:00:00:00:{number:02x}"

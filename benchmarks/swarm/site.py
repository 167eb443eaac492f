"""One machine's Mosquitto, server and swarm, as child processes whose memory and CPU time are watched."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness import peak_bytes
from fedprune.core.errors import FedpruneError
from fedprune_server.enrollment.pki import IDENTITY_FOLDER
from support.processes.machine import find_mosquitto, free_port, listens

_EVERY_S = 1.0
_START_S = 30.0
_STOP_S = 60.0

MOSQUITTO = """\
listener {port} 127.0.0.1
allow_anonymous true
set_tcp_nodelay true
max_connections -1
persistence false
user root
"""

SIGNED = """\
listener {port} 127.0.0.1
cafile {folder}/authority.pem
certfile {folder}/broker.pem
keyfile {folder}/broker.key
tls_version tlsv1.2
crlfile {folder}/crl.pem
require_certificate true
use_identity_as_username true
"""
"""A second listener, at which a server with an identity connects over TLS, as at the broker of every fleet."""


@dataclass
class Watch:
    """What a process and its children have used so far.

    Attributes:
        peak: Largest memory of the process itself, in bytes (VmHWM).
        shared_peak: Largest memory of it and its children together, pages that several hold counted in parts (PSS).
        cpu_s: CPU seconds, those of its children included.
    """

    peak: int = 0
    shared_peak: int = 0
    cpu_s: float = 0.0
    _cpu_s: dict[int, float] = field(default_factory=dict)

    def look(self, pid: int) -> None:
        """Take the measures of this process and those below it now.

        Raises:
            OSError: It has ended.
        """
        pids = family(pid)
        self.peak = max(self.peak, peak_bytes(pid))
        self.shared_peak = max(self.shared_peak, sum(peak_bytes(each, "Pss", "smaps_rollup") for each in pids))
        self._cpu_s |= {each: _cpu_seconds(each) for each in pids}
        self.cpu_s = sum(self._cpu_s.values())


class Site:
    """The processes of one run, which write into a folder; `watched` is what each of them has used, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.tls_port = free_port(), free_port()
        self.watched: dict[str, Watch] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._others: dict[str, int] = {}
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def start(self, name: str, command: Sequence[str | Path], cwd: Path | None = None) -> subprocess.Popen[bytes]:
        """Start a process; what it says goes to `{name}.log`."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen([str(c) for c in command], stdout=log, stderr=log, cwd=cwd or self.folder)
        with self._lock:
            self._processes[name] = process
            self.watched[name] = self.watched.get(name, Watch())
        return process

    def broker(self, *, signed: bool = False) -> None:
        """Start Mosquitto, with a listener for a server with an identity where the site is `signed`."""
        path = self.folder / "mosquitto.conf"
        more = SIGNED.format(port=self.tls_port, folder=self.folder / "state" / IDENTITY_FOLDER) if signed else ""
        path.write_text(MOSQUITTO.format(port=self.port) + more)
        self.start("broker", [find_mosquitto(), "-c", path])
        self.wait_for("broker", lambda: listens(self.port), f"Mosquitto doesn't listen on port {self.port}")

    def server(self, config: Path, *options: str, signed: bool = False) -> None:
        """Start the server, with further options of `run`; with its identity where the site is `signed`."""
        module = ["-m", "fedprune_server.cli.main", "run", "--config", str(config), *options]
        module += [] if signed else ["--insecure"]
        self.start("server", [sys.executable, *module])
        up = "connected to the broker"
        self.wait_for("server", lambda: up in self.log_text("server"), "the server doesn't come up")

    def board(
        self, name: str, profile: str, data: Path, port: int = 0, within: Sequence[str] = ()
    ) -> subprocess.Popen[bytes]:
        """Start a board's own process, at a port in the broker's place and within another command if they are given."""
        command = [*within, sys.executable, "-m", "fedprune_device.cli.main", "run", "--insecure", "--patient"]
        command += ["--no-probe", "--threads", "1", "--profile", profile, "--device", name, "--state", name]
        return self.start(name, [*command, "--broker", f"mqtt://127.0.0.1:{port or self.port}", "--data", data])

    def wait_for(self, name: str, condition: Callable[[], bool], failure: str) -> None:
        """Wait until a process has come so far.

        Raises:
            FedpruneError: It has ended, or takes too long.
        """
        until = time.monotonic() + _START_S
        while not condition():
            if not self.is_alive(name) or time.monotonic() > until:
                raise FedpruneError(failure, hint=self.log_text(name)[-2000:])
            time.sleep(0.05)

    def watch(self, name: str, pid: int) -> None:
        """Measure a process that somebody else has started, too."""
        with self._lock:
            self.watched[name] = Watch()
            self._others[name] = pid

    def log_text(self, name: str) -> str:
        """The output of a process so far."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def look(self) -> None:
        """Take all measures now."""
        with self._lock:
            for name, watched in self.watched.items():
                process = self._processes.get(name)
                if process is None or process.poll() is None:
                    with suppress(OSError):  # it ended just now
                        watched.look(self._others[name] if process is None else process.pid)

    def stop(self, name: str) -> None:
        """Let a process end."""
        process = self._processes[name]
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def kill(self, name: str) -> None:
        """End a process as a power cut does."""
        self._processes[name].kill()
        self._processes[name].wait()

    def is_alive(self, name: str) -> bool:
        """Whether a process runs."""
        return self._processes[name].poll() is None

    def close(self) -> None:
        """End all processes."""
        self._done.set()
        self._watcher.join()
        for process in self._processes.values():
            if process.poll() is None:  # its number may be another's by now
                for pid in family(process.pid):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            process.wait()

    def _watch(self) -> None:
        while not self._done.wait(_EVERY_S):
            self.look()


@contextmanager
def site(folder: Path) -> Iterator[Site]:
    """A site in a folder, with room for as many connections as the system lets a process have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    made = Site(folder)
    try:
        yield made
    finally:
        made.close()


def family(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for each in found:
        for task in Path(f"/proc/{each}/task").glob("*/children"):
            with suppress(OSError):
                found += map(int, task.read_text().split())
    return found


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

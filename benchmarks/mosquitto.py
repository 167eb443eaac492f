"""Mosquitto, for benchmarks: where it is, which one, and brokers of it for a while."""

from __future__ import annotations

import getpass
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.harness import peak_bytes
from fedprune_server.messaging.broker.programs import find_mosquitto
from support.processes.machine import free_port, listens
from support.waiting import until


def needed(who: str) -> tuple[str, str]:
    """Its program and version; a benchmark ends without it."""
    mosquitto = find_mosquitto()
    if mosquitto is None:
        sys.exit(f"{who}: needs mosquitto; install it, or put it into /usr/local/sbin")
    return mosquitto.path, mosquitto.version


class Mosquitto:
    """A broker of its own for a pair of runs."""

    def __init__(self, binary: str, lines: str, folder: Path) -> None:
        self.port = free_port()
        self.url = f"mqtt://127.0.0.1:{self.port}"
        config = folder / "mosquitto.conf"
        config.write_text(f"listener {self.port} 127.0.0.1\nallow_anonymous true\nuser {getpass.getuser()}\n{lines}")
        self._process = subprocess.Popen([binary, "-c", str(config)], stderr=subprocess.DEVNULL)
        until(lambda: listens(self.port), "Mosquitto listens")

    def memory(self, row: str = "VmRSS") -> int:
        """Bytes that it holds, or with VmHWM held at most."""
        return peak_bytes(self._process.pid, row)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


@contextmanager
def mosquitto(binary: str, lines: str = "") -> Iterator[Mosquitto]:
    """A new broker."""
    with tempfile.TemporaryDirectory() as folder:
        broker = Mosquitto(binary, lines, Path(folder))
        try:
            yield broker
        finally:
            broker.close()

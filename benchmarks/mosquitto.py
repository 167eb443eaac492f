"""Mosquitto, for benchmarks: where it is, which one, and brokers of it for a while."""

from __future__ import annotations

import getpass
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedprune_server.messaging.broker.programs import find_mosquitto


def found() -> tuple[str, str] | None:
    """Its program and version; None where it isn't installed."""
    mosquitto = find_mosquitto()
    return None if mosquitto is None else (mosquitto.path, mosquitto.version)


def needed(who: str) -> tuple[str, str]:
    """The same for a benchmark that ends without it."""
    return found() or sys.exit(f"{who}: needs mosquitto; install it, or put it into /usr/local/sbin")


class Mosquitto:
    """A broker of its own for a pair of runs."""

    def __init__(self, binary: str, lines: str, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        config = folder / "mosquitto.conf"
        config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\nuser {getpass.getuser()}\n{lines}")
        self.port = port
        self.url = f"mqtt://127.0.0.1:{port}"
        self._process = subprocess.Popen([binary, "-c", str(config)], stderr=subprocess.DEVNULL)
        for _ in range(100):
            time.sleep(0.05)
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return
        raise RuntimeError("Mosquitto doesn't start")

    def memory(self, row: str = "VmRSS") -> int:
        """Bytes that it holds, or with VmHWM held at most."""
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith(row + ":"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"no {row}")

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

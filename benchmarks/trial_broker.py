"""A Mosquitto of a benchmark's own, on this machine, with the limits that it has by default or that are given."""

from __future__ import annotations

import getpass
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def found() -> str:
    """Mosquitto's program; without one the benchmark ends."""
    binary = shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin")
    if binary is None:
        sys.exit("no mosquitto here: apt install mosquitto")
    return binary


class Mosquitto:
    """A broker that runs."""

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
def mosquitto(binary: str, lines: str) -> Iterator[Mosquitto]:
    """A new broker."""
    with tempfile.TemporaryDirectory() as folder:
        broker = Mosquitto(binary, lines, Path(folder))
        try:
            yield broker
        finally:
            broker.close()

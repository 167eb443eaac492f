"""A Mosquitto of one's own, with its default limits; a conftest imports the fixtures."""

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.processes.machine import find_mosquitto, free_port, listens
from support.waiting import attempts


@dataclass
class Mosquitto:
    process: subprocess.Popen[bytes]
    port: int

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def memory(self, field: str = "VmRSS") -> int:
        """Resident bytes; VmHWM for the most there ever were."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
        raise LookupError(field)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start_mosquitto(tmp_path: Path) -> Iterator[Callable[..., Mosquitto]]:
    """Starts brokers: `start_mosquitto(port=0, settings="")`; `{port}` in the settings is replaced."""
    binary, started = find_mosquitto(), []

    def start(port: int = 0, settings: str = "listener {port} 127.0.0.1\nallow_anonymous true\n") -> Mosquitto:
        port = port or free_port()
        config = tmp_path / f"mosquitto-{port}.conf"
        config.write_text(settings.replace("{port}", str(port)) + "user root\n")
        process = subprocess.Popen([binary, "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started.append(process)
        for _ in attempts("mosquitto's start"):
            if listens(port):
                break
            assert process.poll() is None, f"mosquitto doesn't come up on port {port}"
        return Mosquitto(process, port)

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def mosquitto(start_mosquitto: Callable[..., Mosquitto]) -> Mosquitto:
    return start_mosquitto()

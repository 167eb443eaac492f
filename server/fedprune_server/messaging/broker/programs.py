"""The programs that can be the embedded broker: the system's Mosquitto, or amqtt, which the extra `server` brings."""

from __future__ import annotations

import re
import shutil
import subprocess  # nosec B404  # lists of words, never a shell
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple, Protocol

from fedprune.core.imports import module_code
from fedprune.output.extras import install_command

# Folders in which systems install Mosquitto, and which not every user's PATH names.
_SYSTEM_PATH = "/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin"

_MIN_VERSION = (2, 0)
_VERSION_TIMEOUT_S = 10.0


# Mosquitto's configuration for a trial, with a fleet's limits (`templates/mosquitto.conf`).
_TRIAL_CONFIG = """\
# Started by root, Mosquitto would give up root's rights before it reads its key; for others `user` has no effect.
# docs/run-a-fleet.md advises against root.
user root
log_dest stderr
log_type error
set_tcp_nodelay true
max_packet_size 2000000
message_size_limit 2000000
max_queued_messages 1000
max_queued_bytes 67108864
persistence false
persistent_client_expiration 1h
max_qos 1
allow_anonymous true
"""


@dataclass(frozen=True)
class TlsFiles:
    """A broker's files for TLS (PEM): its certificate with those of its authorities, the key of that certificate, and
    the authority of the clients' certificates; a client needn't have one."""

    certificate: Path
    key: Path
    authority: Path


class Command(NamedTuple):
    """The words of a command that starts a program, and the bytes of its standard input."""

    words: list[str]
    input: bytes = b""


class Program(Protocol):
    """A broker's program; `str` gives its name and version."""

    @property
    def hint(self) -> str:
        """The hint for a broker that doesn't start."""

    def command(self, host: str, port: int, tls: TlsFiles | None) -> Command:
        """The command that listens on an address and a port."""


@dataclass(frozen=True)
class Mosquitto:
    """The system's Mosquitto."""

    path: str
    version: str
    hint = "Check the address, or use another broker (--broker URL)."

    def __str__(self) -> str:
        return f"Mosquitto {self.version}"

    def command(self, host: str, port: int, tls: TlsFiles | None) -> Command:
        # Options of a listener come after its line.
        lines = f"listener {port} {host}".rstrip() + f"\n{_TRIAL_CONFIG}"
        if tls is not None:
            lines += f"certfile {tls.certificate}\nkeyfile {tls.key}\ntls_version tlsv1.2\n"
        return Command([self.path, "-c", "/dev/stdin"], lines.encode())


@dataclass(frozen=True)
class Amqtt:
    """amqtt, in Python; it speaks MQTT 3.1.1 only."""

    @property
    def hint(self) -> str:
        return f"Install Mosquitto, or amqtt: {install_command('server')}"

    def __str__(self) -> str:
        try:
            return f"amqtt {version('amqtt')}"
        except PackageNotFoundError:
            return "amqtt"

    def command(self, host: str, port: int, tls: TlsFiles | None) -> Command:
        code = module_code("fedprune_server.messaging.broker.amqtt_process")
        words = [sys.executable, "-W", "ignore", "-c", code, f"{host}:{port}"]
        if tls is not None:
            words += ["--tls", str(tls.certificate), str(tls.key), str(tls.authority)]
        return Command(words)


def find_mosquitto() -> Mosquitto | None:
    """The system's Mosquitto, on PATH or in folders of `_SYSTEM_PATH`; None without one, or with one before 2.0."""
    path = shutil.which("mosquitto") or shutil.which("mosquitto", path=_SYSTEM_PATH)
    if path is None:
        return None
    try:
        command = [path, "-h"]
        help_run = subprocess.run(command, capture_output=True, text=True, timeout=_VERSION_TIMEOUT_S, check=False)  # noqa: S603  # nosec B603
    except (OSError, subprocess.SubprocessError):
        return None
    version_match = re.search(r"mosquitto version ((\d+)\.(\d+)\S*)", help_run.stdout)
    if version_match is None or (int(version_match[2]), int(version_match[3])) < _MIN_VERSION:
        return None
    return Mosquitto(path, version_match[1])


def available_programs() -> list[Program]:
    """The broker programs of this machine, best first; amqtt may turn out not to be installed."""
    mosquitto = find_mosquitto()
    return [Amqtt()] if mosquitto is None else [mosquitto, Amqtt()]

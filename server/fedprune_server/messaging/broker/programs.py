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

from fedprune.core.atomic_file import write_atomically
from fedprune.core.imports import module_code
from fedprune.output.extras import install_command
from fedprune_server.messaging.broker.broker_files import RULES_FILES, BrokerAddress, filled_template

# Folders in which systems install Mosquitto, and which not every user's PATH names.
_SYSTEM_PATH = "/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin"

_MIN_VERSION = (2, 0)
_VERSION_TIMEOUT_S = 10.0


# Started by root, Mosquitto would give up root's rights before it reads its key; for others `user` has no effect.
# docs/run-a-fleet.md advises against root.
_TRIAL_SETTINGS = "user root\nlog_dest stderr\nlog_type error\n"


@dataclass(frozen=True)
class TlsFiles:
    """A broker's files for TLS (PEM): its certificate with those of its authorities, the key of that certificate, and
    the authority of the clients' certificates. The fleet's access rules for `site` are written beside them."""

    certificate: Path
    key: Path
    authority: Path
    site: str

    def write_rules(self, host: str, port: int) -> list[Path]:
        """Write the access rules for members and for boards that join; returns their paths."""
        address = BrokerAddress((), port, port + 1, self.authority.parent, host)
        for name in RULES_FILES:
            write_atomically(self.authority.parent / name, filled_template(name, self.site, address).encode())
        return [self.authority.parent / name for name in RULES_FILES]


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
        """The command that listens on an address and a port; with `tls` also on the next port, for boards that join."""


@dataclass(frozen=True)
class Mosquitto:
    """The system's Mosquitto."""

    path: str
    version: str
    hint = "Check the address, or use another broker (--broker URL)."

    def __str__(self) -> str:
        return f"Mosquitto {self.version}"

    def command(self, host: str, port: int, tls: TlsFiles | None) -> Command:
        folder, site = (Path(), "") if tls is None else (tls.authority.parent, tls.site)
        config = filled_template("mosquitto.conf", site, BrokerAddress((), port, port + 1, folder, host))
        if tls is None:
            limits = config.partition("\nlistener ")[0]
            # Options of a listener come after its line.
            config = f"{limits}\n{f'listener {port} {host}'.rstrip()}\nmax_qos 1\nallow_anonymous true\n"
        return Command([self.path, "-c", "/dev/stdin"], (_TRIAL_SETTINGS + config).encode())


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
            words += ["--join", f"{host}:{port + 1}", "--rules", *(str(tls.authority.parent / n) for n in RULES_FILES)]
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

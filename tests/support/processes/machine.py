"""What tests need of the machine beside Python; what is missing skips a test by name, and fails it in CI."""

import atexit
import os
import random
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


def find_mosquitto() -> str:
    """Path of the broker; Debian keeps it where not every user looks."""
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI must have mosquitto")
        pytest.skip("mosquitto is not installed")
    return program


def find_chromium() -> str:
    """Path of a Chromium that playwright can drive."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI must have chromium")
        pytest.skip("chromium is not installed")
    return program


def embedded_broker(server: int) -> int | None:
    """The process of a server's embedded broker; None while there is none."""
    for path in Path(f"/proc/{server}/task").glob("*/children"):
        with suppress(OSError):
            for pid in path.read_text().split():
                if re.search(rb"mosquitto\0-c|amqtt_process", Path("/proc", pid, "cmdline").read_bytes()):
                    return int(pid)
    return None


def free_port() -> int:
    """A port that nobody listens on, and that nobody else gets before it is listened on.

    It is none of those that the kernel gives to whoever asks for any, or connects to somebody: between this call and
    the moment when the port is used it might do so. Of tests that run at the same time each port is one process's, and
    so is the next one, where an embedded broker lets boards join.
    """
    try:
        end = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        end = 32_768
    first, end = (10_240, end) if end > 12_000 else (10_240, 65_536)
    while True:
        port, claim = random.SystemRandom().randrange(first, end, 2), socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0fedprune-test-port-{port}")
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            claim.close()
            continue
        atexit.register(claim.close)  # until then nobody else gets the port
        return port


def listens(port: int) -> bool:
    """Whether anybody on this machine listens on it."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of a size such as `256k`, mounted at a new folder."""
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("no small disk can be mounted here: that takes root and the program mount")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def confining_command(folder: Path) -> list[str]:
    """Begins a command that can write into a folder alone, for scripts that set a board up: for root the system is
    read-only to it, and nobody else may write there."""
    if os.geteuid():
        return []
    alone = 'mount --make-rprivate / && mount --bind "$0" "$0" && mount -o remount,ro,bind / && exec "$@"'
    prefix = ["/usr/bin/unshare", "--mount", "/bin/sh", "-c", alone, str(folder)]
    done = subprocess.run([*prefix, "/bin/true"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"root without a namespace of mounts may not run this: {done.stderr.strip()}")
    return prefix

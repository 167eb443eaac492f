"""A board's first boot, from an image to what the server knows of it, in a virtual machine with an Arm processor.

    python benchmarks/first_boot.py [--scheme cloud-init] [--output benchmarks/results/first_boot.json]

An image with Debian for arm64 is built by a plain user and customised by `fedprune-flash image` with a kit that holds a
claim. It boots in qemu (whole system, no network but the way to the broker), installs itself, joins, is measured, and
trains. What counts is read at the server: who was let in, who is online, and the record of the round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.processes.arm_image import BOOT_MB, Image, make_arm_image
from support.processes.arm_site import SITE, Headquarters
from support.processes.arm_userland import BOOKWORM, tool
from support.processes.disk_images import fsck_fat, mtype

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "attic"
GATE = "10.0.2.100"
"""By which address the virtual machine reaches the broker, at the usual ports; there is nothing else in its network."""

PORT, JOIN_PORT = 8883, 8884

PROCESSOR, CORES, MEMORY_MB = "cortex-a72", 2, 2048
LIMIT_S = 1800
TOOLS = {
    "qemu-system-aarch64": "qemu-system-arm",
    "qemu-aarch64-static": "qemu-user-static",
    "proot": "proot",
    "mmdebstrap": "mmdebstrap",
    "mosquitto": "mosquitto",
    "fakeroot": "fakeroot",
    "mformat": "mtools",
    "sfdisk": "fdisk",
    "mke2fs": "e2fsprogs",
    "fsck.fat": "dosfstools",
    "systemd-sysusers": "systemd",
}
SCHEMES = {"cloud-init": 0, "firstrun": 1}
"""How an image takes settings, and how often a board restarts meanwhile; others need programs of Raspberry Pi OS."""

_MARKS = {
    "kernel": r"Booting Linux",
    "systemd": r"systemd\[1\]: (?:Detected|systemd )",
    "cloud-init, local": r"Cloud-init v\. \S+ running 'init-local'",
    "cloud-init, network": r"Cloud-init v\. \S+ running 'init' ",
    "cloud-init, final": r"Cloud-init v\. \S+ running 'modules:final'",
    "firstrun: the installer starts": r"Starting kernel-command-line\.service",
    "service started": r"(?:Started|Starting) fedprune\.service",
    "asks to be let in": rf"{DEVICE} asks to be let into site",
    "member, as the board says": rf"{DEVICE} is a member of site",
    "measured": r"INFO fedprune\.device: probe:",
}
"""What the console shows, by what it means; a look inside, no proof."""


class Clock:
    """Seconds that steps took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)
        print(f"{self.seconds[name]:7.1f} s  {name}", flush=True)


def fedprune_flash(*words: str | Path) -> str:
    """Run the command; it must succeed."""
    command = [sys.executable, "-m", "fedprune_flash.cli.main", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr}")
    return done.stdout


class Machine:
    """A virtual machine; kernel and settings come to it as firmware would bring them.

    Args:
        image: What boots.
        disk: The customised image.
        site: Whose broker it reaches.
        reboots: How often it may restart; then it gets what cmdline.txt says by then.
    """

    def __init__(self, image: Image, disk: Path, site: Headquarters, reboots: int) -> None:
        self._image, self._disk, self._site, self._reboots = image, disk, site, reboots
        self._began = time.monotonic()
        self._consoles: list[Path] = []
        self._process: subprocess.Popen[bytes] | None = None
        self.marks: dict[str, float] = {}

    def __enter__(self) -> Machine:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def look(self) -> None:
        """Note what the console shows, and see that the machine runs."""
        for console in self._consoles:
            text = console.read_text(errors="replace") if console.exists() else ""
            for name, pattern in _MARKS.items():
                if name not in self.marks and re.search(pattern, text):
                    self._mark(name)
        if self._process is not None and self._process.poll() is not None:
            if len(self._consoles) > self._reboots:
                raise SystemExit(f"the virtual machine ended: {self._consoles[-1].read_text(errors='replace')[-3000:]}")
            self._mark("reboot")
            self._start()

    def _mark(self, name: str) -> None:
        self.marks[name] = round(time.monotonic() - self._began, 1)
        print(f"{self.marks[name]:7.1f} s     console: {name}", flush=True)

    def _start(self) -> None:
        self._consoles.append(self._site.folder / f"console-{len(self._consoles)}.log")
        self._process = subprocess.Popen(self._command())

    def _command(self) -> list[str]:
        relay = f"{sys.executable} {ROOT / 'tests' / 'support' / 'processes' / 'arm_relay.py'}"
        ports = {PORT: self._site.port, JOIN_PORT: self._site.join_port}
        gates = "".join(f",guestfwd=tcp:{GATE}:{there}-cmd:{relay} {here}" for there, here in ports.items())
        words = mtype(self._disk, "cmdline.txt", 2048 * 512).decode().strip()
        return [
            *(tool("qemu-system-aarch64", "qemu-system-arm"), "-M", "virt", "-cpu", PROCESSOR, "-smp", str(CORES)),
            *("-m", str(MEMORY_MB), "-accel", "tcg,thread=multi", "-kernel", str(self._image.kernel)),
            *("-initrd", str(self._image.initrd), "-append", words),
            *("-drive", f"file={self._disk},if=virtio,format=raw", "-netdev", f"user,id=n,restrict=on{gates}"),
            *("-device", "virtio-net-pci,netdev=n,romfile=", "-device", "virtio-rng-pci"),
            *("-display", "none", "-monitor", "none", "-serial", f"file:{self._consoles[-1]}", "-no-reboot"),
        ]


def boot(machine: Machine, site: Headquarters, clock: Clock) -> dict[str, Any]:
    """Boot, and wait for what the server sees; returns it."""

    def wait(seen: Callable[[], bool], what: str) -> None:
        with clock.step(what):
            site.wait(lambda: (machine.look(), seen())[1], what, LIMIT_S)

    with site, machine:
        wait(lambda: site.members().get(DEVICE) == "approved", "power on to a member")
        wait(lambda: _online(site), "from there to the first accepted heartbeat")
        wait(lambda: site.ended, "from there to an aggregated update")
        machine.look()
    status = site.status()
    (row,), (device,) = status["rounds"], status["devices"]
    return {
        "members": site.members(),
        "device": {k: device[k] for k in ("name", "profile", "samples", "widths", "bytes_down", "bytes_up")},
        "round": {"progress": row["devices"][DEVICE]["progress"], "metrics": row["metrics"]},
        "console": machine.marks,
    }


def _online(site: Headquarters) -> bool:
    return any(row["name"] == DEVICE and row["online"] for row in site.status().get("devices", []))


def measure(work: Path, scheme: str) -> dict[str, Any]:
    """All steps of a first boot by a scheme, in a folder of their own."""
    print(f"{scheme}:", flush=True)
    clock = Clock()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    work.chmod(0o755)
    site = Headquarters(work / "site", DEVICE, host=GATE)
    claim, signer = work / "claim", site.state / "identity/signing.key"
    claim.write_text(site.claim())
    with clock.step("image with Debian"):
        image = make_arm_image(work / "image", site.samples)
    with clock.step("kit"):
        told = ("--server", f"mqtts://{GATE}:{PORT}", "--site", SITE, "--device", DEVICE, "--claim-file", claim)
        fedprune_flash("kit", "--out", work / "kit", *told, "--python", BOOKWORM.python, "--signing-key", signer)
    disk = work / "attic.img"
    with clock.step("fedprune-flash image"):
        fedprune_flash(
            "image", image.disk, "--out", disk, "--kit", work / "kit", "--signing-key", signer, "--scheme", scheme
        )
    fsck_fat(disk, 2048 * 512, BOOT_MB * 2**20)
    found = boot(Machine(image, disk, site, SCHEMES[scheme]), site, clock)
    return {"seconds": clock.seconds, "at the server": found, "kernel": image.release}


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    (kernel,) = {found["kernel"] for found in result["schemes"].values()}
    lines = [
        "# A board's first boot",
        "",
        f"{result['date']}, {result['machine']}; {versions}.",
        f"Guest: Debian 12, Linux {kernel}, {PROCESSOR} in qemu's TCG, {CORES} cores, {MEMORY_MB} MB,",
        "no network but the way to the broker. Other work ran beside it. Written by `python benchmarks/first_boot.py`.",
    ]
    for scheme, found in result["schemes"].items():
        lines += ["", f"## Scheme {scheme}", *_section(found["seconds"], found["at the server"])]
    return "\n".join(lines) + "\n"


def _section(seconds: dict[str, float], found: dict[str, Any]) -> list[str]:
    device, row = found["device"], found["round"]
    server = (
        f"At the server: {DEVICE} is {found['members'][DEVICE]}; profile {device['profile']}, "
        f"{device['samples']} samples, widths {device['widths']}, {device['bytes_down']} bytes down and "
        f"{device['bytes_up']} up; its update of round 1 was {row['progress']}."
    )
    return [
        *("", "| step | seconds |", "|---|---:|", *(f"| {name} | {s} |" for name, s in seconds.items())),
        *("", server, "", "| on the console | seconds after power on |", "|---|---:|"),
        *(f"| {name} | {s} |" for name, s in found["console"].items()),
    ]


def _tool_version(name: str) -> str:
    done = subprocess.run([name, "--version"], capture_output=True, text=True, check=True)
    return (re.search(r"\d+(\.\d+)+", done.stdout) or ["?"])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "first_boot.json")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "first-boot")
    parser.add_argument("--scheme", choices=SCHEMES, action="append", help="default: all of them")
    arguments = parser.parse_args()
    for name, package in TOOLS.items():
        if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            raise SystemExit(f"{name} is not installed (apt install {package})")
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "versions": {
            "Python": platform.python_version(),
            "fedprune": version("fedprune"),
            "qemu": _tool_version("qemu-system-aarch64"),
        },
        "schemes": {scheme: measure(arguments.work / scheme, scheme) for scheme in arguments.scheme or SCHEMES},
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    arguments.output.with_suffix(".md").write_text(page(result))
    print(page(result))


if __name__ == "__main__":
    main()

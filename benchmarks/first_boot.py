"""A board's first boot, from an image to what the server knows of it, in a virtual machine with an Arm processor.

    python benchmarks/first_boot.py [--output benchmarks/results/first_boot.json] [--work build/first-boot]

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
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from arm_image import Image, make_arm_image
from arm_site import SITE, Headquarters
from arm_userland import BOOKWORM, tool

from disk_images import fsck_fat, mtype

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "attic"
GATE = "10.0.2.100"
"""By which address the virtual machine reaches the broker, at the usual ports; there is nothing else in its network."""

PORT, JOIN_PORT = 8883, 8884

PROCESSOR, CORES, MEMORY_MB = "cortex-a72", 2, 2048
LIMIT_S = 1800

_MARKS = {
    "kernel": r"Booting Linux",
    "systemd": r"systemd\[1\]: (?:Detected|systemd )",
    "cloud-init, local": r"Cloud-init v\. \S+ running 'init-local'",
    "cloud-init, network": r"Cloud-init v\. \S+ running 'init' ",
    "cloud-init, final: the installer starts": r"Cloud-init v\. \S+ running 'modules:final'",
    "service started": r"(?:Started|Starting) fedprune",
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
    command = [sys.executable, "-m", "fedprune_flash.cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr}")
    return done.stdout


def machine(image: Image, disk: Path, ports: dict[int, int], console: Path) -> list[str]:
    """The command of the virtual machine; kernel and settings come to it as firmware would bring them."""
    relay = f"{sys.executable} {ROOT / 'tests' / 'arm_relay.py'}"
    gates = "".join(f",guestfwd=tcp:{GATE}:{there}-cmd:{relay} {here}" for there, here in ports.items())
    return [
        *(tool("qemu-system-aarch64", "qemu-system-arm"), "-M", "virt", "-cpu", PROCESSOR, "-smp", str(CORES)),
        *("-m", str(MEMORY_MB), "-accel", "tcg,thread=multi", "-kernel", str(image.kernel)),
        *("-initrd", str(image.initrd), "-append", mtype(disk, "cmdline.txt", 2048 * 512).decode().strip()),
        *("-drive", f"file={disk},if=virtio,format=raw", "-netdev", f"user,id=n,restrict=on{gates}"),
        *("-device", "virtio-net-pci,netdev=n,romfile=", "-device", "virtio-rng-pci"),
        *("-display", "none", "-monitor", "none", "-serial", f"file:{console}", "-no-reboot"),
    ]


def boot(image: Image, disk: Path, site: Headquarters, clock: Clock) -> dict[str, Any]:
    """Boot, and wait for what the server sees; returns it."""
    console, began, marks = site.folder / "console.log", time.monotonic(), dict[str, float]()
    command = machine(image, disk, {PORT: site.port, JOIN_PORT: site.join_port}, console)

    def seen(what: str, known: bool) -> bool:
        text = console.read_text(errors="replace") if console.exists() else ""
        for name, pattern in _MARKS.items():
            if name not in marks and re.search(pattern, text):
                marks[name] = round(time.monotonic() - began, 1)
                print(f"{marks[name]:7.1f} s     console: {name}", flush=True)
        if virtual.poll() is not None:
            raise SystemExit(f"the virtual machine ended: {text[-3000:]}")
        return known

    with site, subprocess.Popen(command) as virtual:
        try:
            with clock.step("boot to a member"):
                site.wait(lambda: seen("member", site.members().get(DEVICE) == "approved"), "it joins", LIMIT_S)
            with clock.step("from there to the first accepted heartbeat"):
                site.wait(lambda: seen("online", _online(site)), "it is online", LIMIT_S)
            with clock.step("from there to an aggregated update"):
                site.wait(lambda: seen("ended", site.ended), "the round ends", LIMIT_S)
        finally:
            virtual.kill()
    status = site.status()
    (row,), (device,) = status["rounds"], status["devices"]
    return {
        "members": site.members(),
        "device": {k: device[k] for k in ("name", "profile", "samples", "widths", "bytes_down", "bytes_up")},
        "round": {"progress": row["devices"][DEVICE]["progress"], "metrics": row["metrics"]},
        "console": marks,
    }


def _online(site: Headquarters) -> bool:
    return any(row["name"] == DEVICE and row["online"] for row in site.status().get("devices", []))


def measure(work: Path) -> dict[str, Any]:
    """All steps, in a folder of their own."""
    clock = Clock()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    work.chmod(0o755)
    site = Headquarters(work / "site", DEVICE, host=GATE)
    claim = work / "claim"
    claim.write_text(site.claim())
    with clock.step("image with Debian"):
        image = make_arm_image(work / "image", site.samples)
    with clock.step("kit"):
        told = ("--server", f"mqtts://{GATE}:{PORT}", "--site", SITE, "--device", DEVICE, "--claim-file", claim)
        fedprune_flash("kit", "--out", work / "kit", *told, "--python", BOOKWORM.python)
    disk = work / "attic.img"
    with clock.step("fedprune-flash image"):
        said = fedprune_flash("image", image.disk, "--out", disk, "--kit", work / "kit")
    print(said)
    fsck_fat(disk, 2048 * 512, 192 * 2**20)
    found = boot(image, disk, site, clock)
    return {"seconds": clock.seconds, "at the server": found, "kernel": image.release}


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    found = result["at the server"]
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    steps = [f"| {name} | {seconds} |" for name, seconds in result["seconds"].items()]
    marks = [f"| {name} | {seconds} |" for name, seconds in found["console"].items()]
    device, row = found["device"], found["round"]
    server = (
        f"At the server: {DEVICE} is {found['members'][DEVICE]}; profile {device['profile']}, "
        f"{device['samples']} samples, "
        f"widths {device['widths']}, {device['bytes_down']} bytes down, {device['bytes_up']} up; "
        f"its update of round 1 was {row['progress']}."
    )
    return "\n".join(
        [
            "# A board's first boot",
            "",
            f"{result['date']}, {result['machine']}; {versions}.",
            f"Guest: Debian 12, Linux {result['kernel']}, {PROCESSOR} in qemu's TCG, {CORES} cores, {MEMORY_MB} MB,",
            "no network but the way to the broker. Written by `python benchmarks/first_boot.py`.",
            "",
            "| step | seconds |",
            "|---|---:|",
            *steps,
            "",
            server,
            "",
            "| on the console | seconds after power on |",
            "|---|---:|",
            *marks,
            "",
        ]
    )


def _tool_version(name: str) -> str:
    done = subprocess.run([name, "--version"], capture_output=True, text=True, check=True)
    return (re.search(r"\d+(\.\d+)+", done.stdout) or ["?"])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "first_boot.json")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "first-boot")
    arguments = parser.parse_args()
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "versions": {
            "Python": platform.python_version(),
            "fedprune": version("fedprune"),
            "qemu": _tool_version("qemu-system-aarch64"),
        },
        **measure(arguments.work),
    }
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    arguments.output.with_suffix(".md").write_text(page(result))
    print(page(result))


if __name__ == "__main__":
    main()

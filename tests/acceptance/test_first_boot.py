"""A board's first boot, from an image to what the server knows of it, in a virtual machine with an Arm processor.

An image with Debian for arm64 is built by a plain user and customised by `fedprune-flash image` with a kit that holds a
claim. It boots in qemu (whole system, no network but the way to the broker), installs itself, joins, is measured, and
trains. What counts is read at the server: who was let in, who is online, and the record of the round.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.paths import TESTS
from support.processes.arm_image import BOOT_MB, Image, make_arm_image
from support.processes.arm_site import SITE, Headquarters
from support.processes.arm_userland import BOOKWORM, tool
from support.processes.disk_images import fsck_fat, mtype

PROGRAMS = (
    "qemu-system-aarch64", "qemu-aarch64-static", "proot", "mmdebstrap", "mosquitto", "fakeroot", "mformat", "sfdisk",
    "mke2fs", "fsck.fat", "systemd-sysusers",
)  # fmt: skip
MISSING = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.timeout(3 * 3600),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

DEVICE = "attic"
GATE = "10.0.2.100"  # by which the virtual machine reaches the broker; there is nothing else in its network
PORT, JOIN_PORT = 8883, 8884
PROCESSOR, CORES, MEMORY_MB = "cortex-a72", 2, 2048
TIMEOUT_S = 1800
# How an image takes settings, and how often a board restarts meanwhile; others need programs of Raspberry Pi OS.
SCHEMES = {"cloud-init": 0, "firstrun": 1}


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
        self._consoles: list[Path] = []
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Machine:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def look(self) -> None:
        """See that the machine runs, and start it again where it has restarted."""
        if self._process is not None and self._process.poll() is not None:
            assert len(self._consoles) <= self._reboots, self._consoles[-1].read_text(errors="replace")[-3000:]
            self._start()

    def _start(self) -> None:
        self._consoles.append(self._site.folder / f"console-{len(self._consoles)}.log")
        self._process = subprocess.Popen(self._command())

    def _command(self) -> list[str]:
        relay = f"{sys.executable} {TESTS / 'support/processes/arm_relay.py'}"
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


def fedprune_flash(*words: str | Path) -> None:
    command = [sys.executable, "-m", "fedprune_flash.cli.main", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_flashed_image_joins_the_fleet_at_its_first_boot_and_trains(tmp_path: Path, scheme: str) -> None:
    tmp_path.chmod(0o755)
    site = Headquarters(tmp_path / "site", DEVICE, host=GATE)
    claim, signer, disk = tmp_path / "claim", site.state / "identity/signing.key", tmp_path / "attic.img"
    claim.write_text(site.claim())
    image = make_arm_image(tmp_path / "image", site.samples)
    settings = ("--server", f"mqtts://{GATE}:{PORT}", "--site", SITE, "--device", DEVICE, "--claim-file", claim)
    fedprune_flash("kit", "--out", tmp_path / "kit", *settings, "--python", BOOKWORM.python, "--signing-key", signer)
    kit = ("--kit", tmp_path / "kit", "--signing-key", signer, "--scheme", scheme)
    fedprune_flash("image", image.disk, "--out", disk, *kit)
    fsck_fat(disk, 2048 * 512, BOOT_MB * 2**20)
    machine = Machine(image, disk, site, SCHEMES[scheme])

    def is_online() -> bool:
        machine.look()
        return any(row["name"] == DEVICE and row["online"] for row in site.status().get("devices", []))

    with site, machine:
        site.wait(lambda: (machine.look(), site.members().get(DEVICE) == "approved")[1], "a member", TIMEOUT_S)
        site.wait(is_online, "the first accepted heartbeat", TIMEOUT_S)
        site.wait(lambda: (machine.look(), site.ended)[1], "an aggregated update", TIMEOUT_S)
    (row,) = site.status()["rounds"]
    assert row["devices"][DEVICE]["progress"] == "folded"

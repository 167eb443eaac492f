"""How an image takes settings at its first boot, told by what lies on its boot partition.

cloud-init
    Raspberry Pi OS since November 2025, and Ubuntu: `user-data`, `network-config` and `meta-data`, which `ds=nocloud`
    in cmdline.txt asks for (https://www.raspberrypi.com/news/cloud-init-on-raspberry-pi-os/).
firstrun
    Raspberry Pi OS 12, and 13 of 2025-10-01: a script that `systemd.run` in cmdline.txt names
    (https://github.com/raspberrypi/rpi-imager, doc/os_customisation_formats.md).
custom-toml
    An image whose `custom.toml` says it: read once by raspberrypi-sys-mods' firstboot
    (https://github.com/RPi-Distro/raspberrypi-sys-mods). It runs no command, so that a script does.
preseed
    `rpi-preseed.toml`, since August 2026 (https://github.com/raspberrypi/rpi-preseed).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from fedprune.core.errors import ImageError
from fedprune_flash.image.fat import Fat

CMDLINE = "cmdline.txt"
_ISSUE = "issue.txt"
_CLOUD_INIT = ("user-data", "meta-data", "network-config")
_FIRST_INIT = ("init=/usr/lib/raspberrypi-sys-mods/firstboot", "init=/usr/lib/raspi-config/init_resize.sh")
_BEFORE_CLOUD_INIT = "Raspberry Pi reference 2025-10-01"


class Scheme(Enum):
    """A way to take settings."""

    CLOUD_INIT = "cloud-init"
    FIRSTRUN = "firstrun"
    CUSTOM_TOML = "custom-toml"
    PRESEED = "preseed"


def recognise(fat: Fat, in_root: Callable[[str], bool]) -> Scheme:
    """Which scheme an image has.

    Args:
        fat: Its boot partition.
        in_root: Whether a path is in its root file system; False where that can't be read.

    Raises:
        ImageError: There is no cmdline.txt, or nothing tells.
    """
    if fat.find(CMDLINE) is None:
        raise ImageError(
            "the boot partition has no cmdline.txt", expected="that of a Raspberry Pi", got="an image for another board"
        )
    words = fat.read(CMDLINE, 64 * 1024).decode("utf-8", "replace").split()
    if fat.find("rpi-preseed.toml") is not None or in_root("/usr/bin/rpi-preseed"):
        return Scheme.PRESEED
    if any(fat.find(name) is not None for name in _CLOUD_INIT):
        return Scheme.CLOUD_INIT
    if fat.find("custom.toml") is not None:
        return Scheme.CUSTOM_TOML
    if fat.find("firstrun.sh") is not None or any(word in _FIRST_INIT for word in words):
        return Scheme.FIRSTRUN
    if fat.find(_ISSUE) is not None and _BEFORE_CLOUD_INIT in fat.read(_ISSUE).decode("utf-8", "replace"):
        return Scheme.FIRSTRUN
    raise ImageError(
        "nothing on the boot partition tells how this image takes settings",
        expected="user-data, rpi-preseed.toml, custom.toml, or the first boot of Raspberry Pi OS in cmdline.txt",
        hint="Take an unchanged image of Raspberry Pi OS, or say it with --scheme.",
    )

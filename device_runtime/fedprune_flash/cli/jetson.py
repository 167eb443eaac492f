"""`fedprune-flash jetson`: print the commands that put Jetson Linux on a Jetson.

They are never run here: they need NVIDIA's package, root and USB.

Sources:
- 36.x: https://docs.nvidia.com/jetson/archives/r36.4/DeveloperGuide/SD/FlashingSupport.html
- 39.x: https://docs.nvidia.com/jetson/archives/r39.2.1/DeveloperGuide/SD/FlashingSupport.html
- Thor: https://docs.nvidia.com/jetson/archives/r39.2.1/DeveloperGuide/SD/FlashingSupportJetsonThor.html
- 38.x is for Thor alone: https://docs.nvidia.com/jetson/archives/r38.4/DeveloperGuide/IN/QuickStart.html
- which tool, recovery mode, the first user: https://github.com/NVIDIA/skills (skills/jetson-flash-image and others)
- a factory-new Orin Nano needs initrd flashing: https://forums.developer.nvidia.com/t/275575/27

Combinations that none of them shows are refused, not guessed.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass

from fedprune.core.errors import ConfigError, meant, shown
from fedprune.core.validation import matching, word
from fedprune.planning.identification import jetpack

_USER = re.compile(r"[a-z_][a-z0-9_-]{0,30}")
_INITRD = "sudo ./tools/kernel_flash/l4t_initrd_flash.sh --external-device nvme0n1p1"
_NVME = f"{_INITRD} -c tools/kernel_flash/flash_l4t_t234_nvme.xml"
_NANO = f'{_NVME} -p "-c bootloader/generic/cfg/flash_t234_qspi.xml" --showlogs --network usb0'


@dataclass(frozen=True)
class Board:
    """A developer kit: its first release of Jetson Linux on which the runtime works, and its commands.

    They are by release line and by where the root file system goes, the usual place first.
    """

    first: tuple[int, ...]
    flash: Mapping[int, Mapping[str, str]]
    thor: bool = False


def _orin_nano(config: str) -> Board:
    old = {"nvme": f"{_NANO} {config} internal", "sd": f"sudo ./flash.sh {config} mmcblk0p1"}
    # From 39 on its configuration names the NVMe drive by itself.
    new = {"nvme": f"sudo ./l4t_initrd_flash.sh --erase-all {config} internal"}
    return Board((36, 3), {36: old, 39: new})


_AGX_ORIN = "sudo ./flash.sh jetson-agx-orin-devkit internal"
_THOR = {"nvme": "sudo ./l4t_initrd_flash.sh jetson-agx-thor-devkit internal"}

BOARDS = {
    "jetson-orin-nano": _orin_nano("jetson-orin-nano-devkit"),
    "jetson-orin-nano-super": _orin_nano("jetson-orin-nano-devkit-super"),
    "jetson-agx-orin": Board(
        (36, 3),
        {
            36: {"emmc": _AGX_ORIN, "nvme": f"{_NVME} --showlogs --network usb0 jetson-agx-orin-devkit external"},
            39: {"emmc": _AGX_ORIN},
        },
    ),
    "jetson-thor": Board((38, 2), {38: _THOR, 39: _THOR}, thor=True),
}
"""The developer kits whose commands are known."""


def commands(board: str, release: str, storage: str | None = None, user: str = "nvidia") -> list[str]:
    """The commands that put Jetson Linux on a board, in a folder with NVIDIA's two archives; else `ConfigError`."""
    if board not in BOARDS:
        raise ConfigError(f"board{meant(board, BOARDS)}", expected=" or ".join(BOARDS), got=shown(board))
    kit = BOARDS[board]
    known = jetpack(release)
    number = tuple(int(part) for part in release.split("."))
    if known is None or number[0] not in kit.flash or number < kit.first:
        expected = f"{'.'.join(map(str, kit.first))} or newer, of {' or '.join(f'{line}.x' for line in kit.flash)}"
        raise ConfigError(f"release of Jetson Linux for {board}", expected=expected, got=release)
    flash = kit.flash[number[0]]
    storage = storage or next(iter(flash))
    word(f"storage of {board} with {release}", storage, tuple(flash))
    matching("user", user, _USER, "small letters, digits, _ and -")
    return [
        f"tar xf Jetson_Linux_R{release}_aarch64.tbz2",
        f"sudo tar xpf Tegra_Linux_Sample-Root-Filesystem_R{release}_aarch64.tbz2 -C Linux_for_Tegra/rootfs",
        "cd Linux_for_Tegra",
        "sudo ./tools/l4t_flash_prerequisites.sh",
        "sudo ./apply_binaries.sh" + (" --openrm" if kit.thor else ""),
        f"sudo ./tools/l4t_create_default_user.sh --username {user} --accept-license",
        "lsusb -d 0955:",
        flash[storage],
    ]


def add_jetson_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    jetson = commands.add_parser("jetson", help="print the commands that put Jetson Linux on a Jetson")
    jetson.add_argument("board", metavar="BOARD", help="such as jetson-orin-nano")
    jetson.add_argument("--release", required=True, metavar="R", help="of Jetson Linux, such as 36.4.3")
    jetson.add_argument("--storage", metavar="WHERE", help="what it boots from: nvme, sd or emmc (default: as usual)")
    jetson.add_argument("--user", default="nvidia", metavar="NAME", help="the first user (default: nvidia)")
    jetson.set_defaults(run=_jetson)


def _jetson(arguments: argparse.Namespace) -> None:
    lines = commands(arguments.board, arguments.release, arguments.storage, arguments.user)
    print("# On an x86-64 Ubuntu, the board on its USB in recovery mode; all that is on its storage will be lost.")
    print("\n".join(lines))

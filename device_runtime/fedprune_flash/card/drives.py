"""The drives of this machine: their sizes, and which must not be written to.

They are listed by `lsblk --json` on Linux, by `diskutil list -plist` and `diskutil info -plist` on macOS.
"""

from __future__ import annotations

import json
import plistlib
import subprocess  # nosec B404  # lists of words, never a shell
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprune.core.errors import CardError, shown

LSBLK = ("lsblk", "--json", "--bytes", "--output", "PATH,SIZE,TYPE,RO,RM,HOTPLUG,TRAN,MODEL,MOUNTPOINTS")
_SYSTEM = frozenset({"/", "/boot", "/boot/efi", "/boot/firmware", "/home", "/usr", "/var", "/nix", "[SWAP]"})
_MAX_NAME = 60


@dataclass(frozen=True)
class Drive:
    """A drive by its device, such as /dev/sdb. `mounts` are its mount points and other users."""

    path: str
    size: int
    name: str
    removable: bool
    read_only: bool
    mounts: tuple[str, ...] = ()

    @property
    def system(self) -> bool:
        """Whether this machine runs from it."""
        return any(mount in _SYSTEM or mount.startswith("/System") for mount in self.mounts)

    def __str__(self) -> str:
        return f"{self.path}: {self.name or 'without a name'}, {self.size / 1e9:.1f} GB"


def drives() -> list[Drive]:
    """The drives of this machine; raises `CardError` if they can't be listed."""
    if sys.platform == "darwin":
        listed = _output(("diskutil", "list", "-plist", "physical"))
        names = disk_names(listed)
        return [from_diskutil(_output(("diskutil", "info", "-plist", name)), listed) for name in names]
    return from_lsblk(_output(LSBLK))


def mmc_type(name: str) -> str:
    """The type of an mmcblk device: SD for a card, MMC for soldered memory, else empty.

    https://docs.kernel.org/driver-api/mmc/mmc-dev-attrs.html
    """
    try:
        return Path(f"/sys/block/{name}/device/type").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def from_lsblk(raw: bytes, mmc: Callable[[str], str] = mmc_type) -> list[Drive]:
    """The drives in lsblk's output; `mmc` returns SD or MMC for a device's name."""
    try:
        rows = json.loads(raw)["blockdevices"]
        return [_from_row(row, mmc) for row in rows if row.get("type") == "disk" and row.get("size")]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CardError("lsblk's list of this machine's drives can't be read", got=shown(raw[:60])) from error


def _from_row(row: Mapping[str, Any], mmc: Callable[[str], str]) -> Drive:
    mounts = tuple(sorted({str(m) for r in _all(row) for m in r.get("mountpoints") or () if m}))
    used = tuple(f"{r['type']} {r['path']}" for r in _all(row) if r.get("type") not in ("disk", "part"))
    removable = bool(row.get("rm") or row.get("hotplug") or row.get("tran") == "usb")
    if str(row["path"]).startswith("/dev/mmcblk"):
        # A card in a built-in reader is reported as fixed, like the memory of a tablet.
        removable = mmc(Path(row["path"]).name) == "SD"
    return Drive(
        str(row["path"]), int(row["size"]), _name(row.get("model")), removable, bool(row.get("ro")), mounts + used
    )


def _all(row: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield row
    for child in row.get("children") or ():
        yield from _all(child)


def disk_names(raw: bytes) -> list[str]:
    """The whole disks in the output of `diskutil list -plist`."""
    names = _plist(raw).get("WholeDisks", [])
    if not isinstance(names, list):
        raise CardError("diskutil's list of this machine's drives can't be read", got=shown(names))
    return [str(name) for name in names]


def from_diskutil(info: bytes, listed: bytes) -> Drive:
    """The drive of `diskutil info -plist`, mounted as `diskutil list -plist` has it."""
    body = _plist(info)
    name = str(body.get("DeviceIdentifier", ""))
    try:
        rows = [r for r in _plist(listed).get("AllDisksAndPartitions", []) if r.get("DeviceIdentifier") == name]
        parts = [p for r in rows for p in (r, *r.get("Partitions", []), *r.get("APFSVolumes", []))]
        mounts = {str(p["MountPoint"]) for p in parts if p.get("MountPoint")}
        if body.get("SystemImage") or (body.get("Internal") and not body.get("Ejectable")):
            mounts.add("/")  # on a Mac the system is in a container that names no disk here
        return Drive(
            str(body["DeviceNode"]),
            int(body["TotalSize"]),
            _name(body.get("MediaName")),
            bool(body.get("RemovableMediaOrExternalDevice", body.get("RemovableMedia"))),
            not body.get("WritableMedia", True),
            tuple(sorted(mounts)),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CardError("diskutil's description of a drive can't be read", got=shown(info[:60])) from error


def _plist(raw: bytes) -> dict[str, Any]:
    try:
        body = plistlib.loads(raw)
    except Exception as error:  # damaged data makes plistlib raise LookupError, IndexError and more
        raise CardError("diskutil's list of this machine's drives can't be read", got=shown(raw[:60])) from error
    if not isinstance(body, dict):
        raise CardError("diskutil's list of this machine's drives can't be read", got=shown(body))
    return body


def _name(value: object) -> str:
    text = "" if value is None else str(value)
    return "".join(c for c in text if c.isprintable()).strip()[:_MAX_NAME]


def _output(command: tuple[str, ...]) -> bytes:
    try:
        return subprocess.run(command, capture_output=True, check=True).stdout  # noqa: S603  # nosec B603  # words of our own, and a path that is an argument of its own
    except (OSError, subprocess.CalledProcessError) as error:
        raise CardError(
            f"{command[0]} doesn't tell this machine's drives", hint="Write the image with another program."
        ) from error


def chosen(path: str, known: list[Drive], needed: int) -> Drive:
    """The drive to write to; raises `CardError` if it is missing or must not be written to."""
    real = str(Path(path).resolve())
    cards = [d for d in known if d.removable and not d.system and not d.read_only]
    drive = next((d for d in known if d.path in (path, real)), None)
    there = f"a card or stick: {'; '.join(str(d) for d in cards) or 'none is there'}"
    if drive is None:
        raise CardError(
            f"{path} isn't a drive of this machine", expected=there, hint="Name the drive, not a partition."
        )
    if drive.system:
        raise CardError(f"{drive} holds this system", expected=there)
    if not drive.removable:
        raise CardError(f"{drive} is built in", expected=there)
    if drive.mounts:
        raise CardError(f"{drive} is in use ({', '.join(drive.mounts)[:200]})", hint="Unmount it first.")
    if drive.read_only:
        raise CardError(f"{drive} is read-only", hint="Cards have a switch on their side.")
    if drive.size < needed:
        raise CardError(f"{drive} is too small", expected=f"{needed / 1e9:.1f} GB or more")
    return drive

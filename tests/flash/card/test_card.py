from __future__ import annotations

import hashlib
import io
import json
import os
import plistlib
import random
from pathlib import Path
from typing import Any

import pytest

from fedprune.core.errors import CardError
from fedprune_flash.card.card_writer import write_card
from fedprune_flash.card.drives import Drive, chosen, disk_names, from_diskutil, from_lsblk
from fedprune_flash.cli import main as cli
from fedprune_flash.cli.image import _write_card


def row(path: str, size: int, kind: str = "part", **more: Any) -> dict[str, Any]:
    """A row of what lsblk of util-linux 2.38 prints."""
    body = {"path": path, "size": size, "type": kind, "ro": False, "rm": False, "hotplug": False, "tran": None}
    return {**body, "model": None, "mountpoints": [None], **more}


KINDS = {"mmcblk0": "SD", "mmcblk1": "MMC"}

# The disk of a laptop, a card in a USB reader, one in a built-in reader, a stick whose encrypted volume is open,
# memory that is soldered in, a stick that is locked, and an empty reader.
LSBLK = json.dumps(
    {
        "blockdevices": [
            row("/dev/loop0", 4096, "loop", mountpoints=["/snap/x"]),
            row(
                "/dev/nvme0n1",
                512110190592,
                "disk",
                tran="nvme",
                model="SAMSUNG MZVL2512",
                children=[row("/dev/nvme0n1p1", 10**9, mountpoints=["/boot/efi"]), row("/dev/nvme0n1p2", 10**11)],
            ),
            row("/dev/sdb", 31914983424, "disk", tran="usb", rm=True, hotplug=True, model="STORAGE DEVICE  "),
            row(
                "/dev/mmcblk0",
                63864569856,
                "disk",
                children=[row("/dev/mmcblk0p1", 536870912, mountpoints=["/media/ann/bootfs"])],
            ),
            row(
                "/dev/sdc",
                8 * 10**9,
                "disk",
                tran="usb",
                rm=True,
                children=[row("/dev/sdc1", 8 * 10**9, children=[row("/dev/mapper/luks", 8 * 10**9, "crypt")])],
            ),
            row("/dev/mmcblk1", 31268536320, "disk", tran="mmc", hotplug=True),
            row("/dev/sdd", 4 * 10**9, "disk", tran="usb", rm=True, ro=True),
            row("/dev/sde", 0, "disk", tran="usb", rm=True),
        ]
    }
).encode()


def test_drives_are_read_from_lsblk() -> None:
    found = {d.path: d for d in from_lsblk(LSBLK, KINDS.__getitem__)}
    assert set(found) == {"/dev/nvme0n1", "/dev/sdb", "/dev/mmcblk0", "/dev/mmcblk1", "/dev/sdc", "/dev/sdd"}
    assert found["/dev/nvme0n1"].system
    assert str(found["/dev/sdb"]) == "/dev/sdb: STORAGE DEVICE, 31.9 GB"
    assert [p for p, d in found.items() if d.removable] == ["/dev/sdb", "/dev/mmcblk0", "/dev/sdc", "/dev/sdd"]
    assert found["/dev/mmcblk0"].mounts == ("/media/ann/bootfs",)
    assert found["/dev/sdc"].mounts == ("crypt /dev/mapper/luks",)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/dev/nvme0n1", "holds this system"),
        ("/dev/mmcblk0", "is in use (/media/ann/bootfs)"),
        ("/dev/mmcblk1", "is built in"),
        ("/dev/sdc", "is in use (crypt"),
        ("/dev/sdd", "is read-only"),
        ("/dev/sdb1", "isn't a drive of this machine"),
        ("/dev/null", "isn't a drive of this machine"),
    ],
)
def test_drives_that_must_not_be_written_to_are_refused(path: str, words: str) -> None:
    with pytest.raises(CardError) as caught:
        chosen(path, from_lsblk(LSBLK, KINDS.__getitem__), 10**9)
    assert words in str(caught.value)


def test_a_card_that_is_too_small_is_refused() -> None:
    known = from_lsblk(LSBLK, KINDS.__getitem__)
    assert chosen("/dev/sdb", known, 31914983424).path == "/dev/sdb"
    with pytest.raises(CardError, match="too small"):
        chosen("/dev/sdb", known, 31914983425)


LISTED = plistlib.dumps(
    {
        "WholeDisks": ["disk0", "disk4"],
        "AllDisksAndPartitions": [
            {"DeviceIdentifier": "disk0", "Partitions": [{"DeviceIdentifier": "disk0s1"}]},
            {
                "DeviceIdentifier": "disk4",
                "Partitions": [{"DeviceIdentifier": "disk4s1", "MountPoint": "/Volumes/bootfs"}],
            },
        ],
    }
)


def info(name: str, **more: Any) -> bytes:
    body = {"DeviceIdentifier": name, "DeviceNode": f"/dev/{name}", "TotalSize": 31914983424, "WritableMedia": True}
    return plistlib.dumps({**body, "MediaName": "SD Card Reader", **more})


def test_drives_are_read_from_diskutil() -> None:
    assert disk_names(LISTED) == ["disk0", "disk4"]
    inside = from_diskutil(info("disk0", Internal=True, RemovableMediaOrExternalDevice=False), LISTED)
    card = from_diskutil(info("disk4", Internal=False, Ejectable=True, RemovableMediaOrExternalDevice=True), LISTED)
    assert inside.system
    assert not inside.removable
    assert (card.removable, card.system, card.mounts) == (True, False, ("/Volumes/bootfs",))
    with pytest.raises(CardError, match="is in use"):
        chosen("/dev/disk4", [card], 1)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(random.Random(3).randbytes(9_000_001))
    return path


@pytest.fixture
def card(tmp_path: Path) -> Path:
    path = tmp_path / "card"
    path.write_bytes(b"\xff" * 10_000_000)
    return path


def test_a_card_holds_what_was_written_and_its_digest_is_told(image: Path, card: Path) -> None:
    told: list[int] = []
    digest = write_card(image, card, told.append)
    assert card.read_bytes() == image.read_bytes() + b"\xff" * 999_999
    assert digest == hashlib.sha256(image.read_bytes()).hexdigest()
    assert sum(told) == 18_000_002
    assert all(more > 0 for more in told)


def test_a_card_that_gives_back_something_else_is_noticed(
    image: Path, card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwrite

    def forgetful(descriptor: int, data: bytes, at: int) -> int:
        return len(data) if at > 4_000_000 else write(descriptor, data, at)

    monkeypatch.setattr("os.pwrite", forgetful)
    with pytest.raises(CardError, match="gives back something else"):
        write_card(image, card, lambda *_: None)


def test_a_card_that_was_pulled_out_has_no_partition_table(
    image: Path, card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwrite

    def pulled(descriptor: int, data: bytes, at: int) -> int:
        if at > 5_000_000:
            raise OSError(5, "Input/output error")
        return write(descriptor, data, at)

    monkeypatch.setattr("os.pwrite", pulled)
    with pytest.raises(CardError, match="Input/output error"):
        write_card(image, card, lambda *_: None)
    assert card.read_bytes()[:512] == bytes(512)


@pytest.mark.parametrize(("typed", "confirmed"), [("{}\n", True), ("yes\n", False), ("\n", False), ("", False)])
def test_only_the_devices_name_confirms(
    typed: str,
    confirmed: bool,
    image: Path,
    card: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    drive = Drive(str(card), 10_000_000, "Test Card", removable=True, read_only=False)
    monkeypatch.setattr("fedprune_flash.card.drives.drives", lambda: [drive])
    monkeypatch.setattr("sys.stdin", io.StringIO(typed.format(card)))
    before = card.read_bytes()
    if confirmed:
        _write_card(image, str(card), None)
        assert card.read_bytes()[: image.stat().st_size] == image.read_bytes()
    else:
        with pytest.raises(CardError, match="not confirmed"):
            _write_card(image, str(card), None)
        assert card.read_bytes() == before
    assert "Test Card, 0.0 GB" in capsys.readouterr().out


def test_yes_must_name_the_same_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["image", "x.img", "--out", str(tmp_path / "o"), "--kit", "k"]
    assert cli.main([*arguments, "--card", "/dev/sdb", "--yes", "/dev/sdc"]) == 2
    assert "another device" in capsys.readouterr().err

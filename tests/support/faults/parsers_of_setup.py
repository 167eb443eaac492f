"""Parsers of what boards are set up from: claims, drives, kits, disk images."""

import gzip
import hashlib
import io
import lzma
import struct
from functools import cache
from pathlib import Path

from fedprune.security.authority import Authority
from fedprune.security.join_claim import JoinClaim
from fedprune_flash.image.boot_image import unpack_image
from fedprune_flash.image.partitions import read_partitions
from fedprune_flash.kit.board_settings import check_authorities
from fedprune_flash.kit.kit import open_kit
from fedprune_flash.on_board.kit_folder import KitFolder
from support.faults.parser_target import Target, as_file, as_text, json_seeds, scratch

_FILES = 2 * 2**20  # bytes that hashing and unpacking may take for any file


@cache
def setup_targets() -> tuple[Target, ...]:
    """All of them."""
    return (*_joining_targets(), *_kits(), *_images())


def _joining_targets() -> tuple[Target, ...]:
    claim = JoinClaim(b"i" * 5, b"s" * 15, b"p" * 12).text
    authority = Authority.make(scratch() / "board authority", "lab").pem.encode()
    return (
        Target(
            "told.claim",
            as_text(lambda text: JoinClaim.parse(text, "it")),
            (claim.encode(), claim.lower().encode() + b"\n"),
            text=True,
        ),
        Target("told.authorities", check_authorities, (authority, authority * 2), text=True, share=0.5),
    )


def _kits() -> tuple[Target, ...]:
    folder = scratch() / "kit"
    (folder / "wheelhouse").mkdir(parents=True, exist_ok=True)
    files = {"wheelhouse/a-1-py3-none-any.whl": b"wheel", "install.pyz": b"x"}
    rows = []
    for path, data in files.items():
        (folder / path).write_bytes(data)
        rows.append({"path": path, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    manifest = {
        "version": 4, "fedprune": "0.1", "python": "3.11", "architecture": "aarch64", "jetson": False,
        "device": "attic", "data": "local",
        "imports": {"numpy": "numpy"}, "claim": None, "files": rows,
        "number": 0, "entry": "app:main", "contents": "0" * 64, "key": None,
    }  # fmt: skip

    def read_kit(raw: bytes) -> object:
        (folder / "kit.json").write_bytes(raw)
        return open_kit(folder)

    def check_kit(raw: bytes) -> object:
        (folder / "kit.json").write_bytes(raw)
        kit = KitFolder(folder)
        kit.check_files()
        return kit

    return (
        Target("kit.made", read_kit, json_seeds(manifest), text=True, constant=_FILES, share=0.3),
        Target("kit.on the board", check_kit, json_seeds(manifest), text=True, constant=_FILES, share=0.3),
    )


def _images() -> tuple[Target, ...]:
    head = bytearray(2**16)
    head[510:512] = b"\x55\xaa"
    for number, (kind, start, sectors) in enumerate(((0x0C, 8, 16), (0x83, 32, 64))):
        head[446 + 16 * number + 4] = kind
        struct.pack_into("<II", head, 446 + 16 * number + 8, start, sectors)
    image = bytes(head)
    out = scratch() / "unpacked.img"

    def unpack(path: Path) -> object:
        with out.open("wb") as file:
            return unpack_image(path, file)

    packed = (gzip.compress(image, mtime=0), lzma.compress(image))
    return (
        Target("image.partitions", lambda raw: read_partitions(io.BytesIO(raw), len(raw)), (image,), constant=_FILES),
        Target("image.packed", as_file(unpack, "packed.img"), (*packed, image), constant=80 * 2**20, share=0.2),
    )

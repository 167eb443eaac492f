"""A release of the runtime: what a board is to run, which files it is made of, and the server's signature on that.

A release has a number that only grows. What is to be gone back to is released once more, under a new number: a board
refuses numbers that are not above all that it has seen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedprune import signature
from fedprune.disk import file_digest, storage_errors, write_whole
from fedprune.errors import ProtocolError, ReleaseError, shown
from fedprune.wire import fields as check

MANIFEST, SIGNATURE, FILES = "release.json", "release.sig", "files"
"""Names in a release's folder."""

MAX_MANIFEST = 65_536
MAX_FILES = 64
MAX_FILE = 2**30
MAX_BYTES = 2**31
MAX_UNPACKED = 2**32
MAX_NUMBER = 2**31 - 1
"""What a release may have: bytes of a manifest, files, bytes of a file, of all files, and of all that is unpacked."""

_PURPOSE = "release 1"
_FORMAT = "fedprune.release/1"
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}\.whl")
_ENTRY = re.compile(r"[A-Za-z_]\w{0,63}(\.[A-Za-z_]\w{0,63}){0,7}:[A-Za-z_]\w{0,63}", re.ASCII)
_MODULE = re.compile(r"[A-Za-z_]\w{0,63}", re.ASCII)
_PYTHON = re.compile(r"cp3[0-9]{1,2}")
_MACHINE = re.compile(r"[a-z0-9_]{1,32}")


@dataclass(frozen=True)
class ReleaseFile:
    """A wheel of a release.

    Attributes:
        name: Its file name.
        sha256: Its digest, and its name where it is kept.
        size: Bytes.
    """

    name: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Release:
    """What a board is to run.

    Attributes:
        number: Above that of every earlier release.
        version: What people call it.
        python: The Python that its wheels are for, such as cp311.
        machine: The processor that they are for, as `uname -m` says it, such as aarch64.
        entry: What to run, `module:function`.
        unpacked: Bytes that it takes when it is installed, at most.
        files: Its wheels.
        launcher: The oldest launcher that can start it.
        created: When it was made, for people; nothing is decided by it.
        system: Packages that it takes from the board's own Python, such as JetPack's onnxruntime.
    """

    number: int
    version: str
    python: str
    machine: str
    entry: str
    unpacked: int
    files: tuple[ReleaseFile, ...]
    launcher: int = 1
    created: str = ""
    system: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """What its files take together."""
        return sum(f.size for f in self.files)

    def to_bytes(self) -> bytes:
        """The manifest, which is what is signed."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Release:
        """Read a manifest and check all of it.

        Raises:
            ReleaseError: It is too long, no manifest, or a field of it makes no sense.
        """
        try:
            if len(data) > MAX_MANIFEST:
                raise ProtocolError("size", expected=f"at most {MAX_MANIFEST} bytes", got=len(data))
            try:
                body = json.loads(data)
            except (ValueError, RecursionError) as error:
                raise ProtocolError("content", expected="JSON") from error
            return cls._checked(body)
        except ProtocolError as error:
            raise ReleaseError(f"a release's manifest: {error}") from error

    @classmethod
    def _checked(cls, body: Any) -> Release:
        table = _table("content", body, ("format", *(f.name for f in fields(cls))))
        if table["format"] != _FORMAT:
            raise ProtocolError("format", expected=_FORMAT, got=shown(table["format"]))
        rows = _list("files", table["files"], MAX_FILES)
        files = tuple(_file(f"files[{i}]", row) for i, row in enumerate(rows))
        made = cls(
            number=check.whole(1, MAX_NUMBER)("number", table["number"]),
            version=check.one_line(check.text(64)("version", table["version"])),
            python=_matching("python", table["python"], _PYTHON, "a Python such as cp311"),
            machine=_matching("machine", table["machine"], _MACHINE, "a processor such as aarch64"),
            entry=_matching("entry", table["entry"], _ENTRY, "module:function"),
            unpacked=check.whole(0, MAX_UNPACKED)("unpacked", table["unpacked"]),
            files=files,
            launcher=check.whole(1, MAX_NUMBER)("launcher", table["launcher"]),
            created=check.one_line(check.text(64)("created", table["created"])),
            system=tuple(
                _matching("system", name, _MODULE, "names of packages") for name in _list("system", table["system"], 32)
            ),
        )
        if not files or len({f.name for f in files}) < len(files) or len({f.sha256 for f in files}) < len(files):
            raise ProtocolError("files", expected="some, each of them once", got=f"{len(files)} entries")
        if made.size > MAX_BYTES:
            raise ProtocolError("files", expected=f"at most {MAX_BYTES} bytes together", got=made.size)
        return made


def opened(manifest: bytes, signed: bytes, key: Ed25519PublicKey) -> Release:
    """A release whose signature is good; nothing of the manifest is looked at before.

    Args:
        manifest: Its bytes.
        signed: The detached signature.
        key: The server's.

    Raises:
        ReleaseError: The signature isn't the server's, or the manifest makes no sense.
    """
    if len(manifest) > MAX_MANIFEST or not signature.verified(key, _PURPOSE, manifest, signed):
        raise ReleaseError(
            "the release's signature is not the server's",
            hint="Give the board the public key of the server that made it, or have the release made again.",
        )
    return Release.from_bytes(manifest)


def write_release(
    folder: Path, release: Callable[[tuple[ReleaseFile, ...]], Release], wheels: Iterable[Path], key: Ed25519PrivateKey
) -> Release:
    """Make a release's folder: the manifest, its signature, and the wheels by digest.

    Args:
        folder: Where to; made if missing.
        release: The release, given its files.
        wheels: The wheels.
        key: The server's.

    Raises:
        ReleaseError: The release makes no sense.
        StorageError: A file can't be read or written.
    """
    with storage_errors(f"can't make a release in {folder}"):
        (folder / FILES).mkdir(parents=True, exist_ok=True)
        rows = []
        for wheel in sorted(wheels, key=lambda w: w.name):
            row = ReleaseFile(wheel.name, file_digest(wheel), wheel.stat().st_size)
            write_whole(folder / FILES / row.sha256, wheel.read_bytes())
            rows.append(row)
    made = Release.from_bytes(release(tuple(rows)).to_bytes())
    write_whole(folder / MANIFEST, made.to_bytes())
    write_whole(folder / SIGNATURE, signature.sign(key, _PURPOSE, made.to_bytes()))
    return made


def _file(where: str, value: object) -> ReleaseFile:
    row = _table(where, value, ("name", "sha256", "size"))
    return ReleaseFile(
        _matching(f"{where}.name", row["name"], _FILE, "the name of a wheel"),
        check.digest(f"{where}.sha256", row["sha256"]),
        check.whole(1, MAX_FILE)(f"{where}.size", row["size"]),
    )


def _table(where: str, value: object, keys: Iterable[str]) -> Mapping[str, Any]:
    wanted = set(keys)
    if not isinstance(value, dict) or set(value) != wanted:
        raise ProtocolError(where, expected=f"an object of {', '.join(sorted(wanted))}", got=shown(value))
    return value


def _list(where: str, value: object, limit: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > limit:
        raise ProtocolError(where, expected=f"a list of at most {limit}", got=shown(value))
    return value


def _matching(where: str, value: object, pattern: re.Pattern[str], expected: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ProtocolError(where, expected=expected, got=shown(value))
    return value

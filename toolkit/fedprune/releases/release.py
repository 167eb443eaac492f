"""Releases of the runtime: a manifest of files, and the server's signature of it.

The numbers of releases increase. To go back, an earlier release is made again under a new number: a board refuses
numbers that are not above all that it has seen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedprune.core import validation as check
from fedprune.core.atomic_file import write_whole
from fedprune.core.disk import file_digest, storage_errors
from fedprune.core.errors import ProtocolError, ReleaseError, SignatureError, shown
from fedprune.core.json_file import decode_json
from fedprune.core.text import one_line
from fedprune.security.keys import SIGNATURE as SIGNATURE_BYTES
from fedprune.security.keys import SigningKey, VerifyingKey
from fedprune.wire.fleet_messages import MAX_FILES, MAX_MANIFEST, MAX_NUMBER

MANIFEST, SIGNATURE, FILES = "release.json", "release.sig", "files"
"""Names in a release's folder."""

MAX_FILE = 2**30
MAX_BYTES = 2**31
MAX_UNPACKED = 2**32
"""Limits of a release: bytes of a file, of all files, and of all unpacked files."""

_MAX_LABEL = 64
_MAX_SYSTEM = 32

_PURPOSE = b"fedprune release 1\n"
"""Domain of the signature, so that signatures for other purposes are invalid here."""

_FORMAT = "fedprune.release/1"
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}\.whl")
_ENTRY = re.compile(r"[A-Za-z_]\w{0,63}(\.[A-Za-z_]\w{0,63}){0,7}:[A-Za-z_]\w{0,63}", re.ASCII)
_MODULE = re.compile(r"[A-Za-z_]\w{0,63}", re.ASCII)
_PYTHON = re.compile(r"cp3[0-9]{1,2}")
_MACHINE = re.compile(r"[a-z0-9_]{1,32}")


@dataclass(frozen=True)
class ReleaseFile:
    """A wheel of a release, stored under its digest."""

    name: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Release:
    """A release's manifest.

    Attributes:
        number: Above that of every earlier release.
        version: Its name for people.
        python: The Python of its wheels, such as cp311.
        machine: Their processor as of `uname -m`, such as aarch64.
        entry: The program, `module:function`.
        unpacked: Bytes of the installation at most.
        files: Its wheels.
        contents: sha256 of all files that its wheels bring, by path, sha256 and size: what a board's launcher compares.
        launcher: The oldest launcher that can start it.
        created: When it was made, for people.
        system: Packages of the board's own Python that it uses, such as JetPack's onnxruntime.
    """

    number: int
    version: str
    python: str
    machine: str
    entry: str
    unpacked: int
    files: tuple[ReleaseFile, ...]
    contents: str
    launcher: int = 1
    created: str = ""
    system: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return sum(f.size for f in self.files)

    def to_bytes(self) -> bytes:
        """The manifest, as it is signed."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Release:
        """Read a manifest and check all of it. Raises `ReleaseError` if it is too long, not a manifest, or a field
        is invalid."""
        try:
            if len(data) > MAX_MANIFEST:
                raise ProtocolError("size", expected=f"at most {MAX_MANIFEST} bytes", got=len(data))
            try:
                body = decode_json(data)
            except (ValueError, RecursionError) as error:
                raise ProtocolError("content", expected="JSON") from error
            return cls._checked(body)
        except ProtocolError as error:
            raise ReleaseError(f"a release's manifest: {error}") from error

    @classmethod
    def _checked(cls, body: Any) -> Release:
        table = _record("content", body, ("format", *(f.name for f in fields(cls))))
        if table["format"] != _FORMAT:
            raise ProtocolError("format", expected=_FORMAT, got=shown(table["format"]))
        rows = check.items("files", table["files"], MAX_FILES, "files", error=ProtocolError)
        files = tuple(_file(f"files[{i}]", row) for i, row in enumerate(rows))
        names = check.items("system", table["system"], _MAX_SYSTEM, "packages", error=ProtocolError)
        made = cls(
            number=_whole("number", table["number"], 1, MAX_NUMBER),
            version=_label("version", table["version"]),
            python=_matching("python", table["python"], _PYTHON, "a Python such as cp311"),
            machine=_matching("machine", table["machine"], _MACHINE, "a processor such as aarch64"),
            entry=_matching("entry", table["entry"], _ENTRY, "module:function"),
            unpacked=_whole("unpacked", table["unpacked"], 0, MAX_UNPACKED),
            files=files,
            contents=check.digest("contents", table["contents"], error=ProtocolError),
            launcher=_whole("launcher", table["launcher"], 1, MAX_NUMBER),
            created=_label("created", table["created"]),
            system=tuple(_matching("system", name, _MODULE, "names of packages") for name in names),
        )
        if not files or len({f.name for f in files}) < len(files) or len({f.sha256 for f in files}) < len(files):
            raise ProtocolError("files", expected="some, each of them once", got=f"{len(files)} entries")
        if made.size > MAX_BYTES:
            raise ProtocolError("files", expected=f"at most {MAX_BYTES} bytes together", got=made.size)
        return made


def signed(manifest: bytes, key: SigningKey) -> bytes:
    return key.sign(_PURPOSE + manifest)


def is_signed(manifest: bytes, signature: bytes, key: VerifyingKey) -> bool:
    """Whether a manifest's detached signature is this key's; the manifest is not parsed."""
    try:
        key.verify(signature, _PURPOSE + manifest)
    except SignatureError:
        return False
    return True


def opened(manifest: bytes, signature: bytes, key: VerifyingKey) -> Release:
    """Verify a manifest's signature by the server's key, then parse it. Raises `ReleaseError` if the signature isn't
    the server's, or the manifest is invalid."""
    if len(manifest) > MAX_MANIFEST or not is_signed(manifest, signature, key):
        raise ReleaseError(
            "the release's signature is not the server's",
            hint=f"This board takes releases of key {key.fingerprint} alone. Have the release made again there.",
        )
    return Release.from_bytes(manifest)


def read_release(folder: Path, key: VerifyingKey) -> tuple[Release, bytes, bytes]:
    """Read a release's folder, verifying its signature and all files; returns the release, its manifest and the
    signature. Raises `ReleaseError` if the signature isn't this key's, or a file is missing or different."""
    with storage_errors(f"can't read the release in {folder}"):
        manifest = _read(folder / MANIFEST, MAX_MANIFEST)
        signature = _read(folder / SIGNATURE, SIGNATURE_BYTES)
        release = opened(manifest, signature, key)
        for file in release.files:
            path = folder / FILES / file.sha256
            if not path.is_file() or path.stat().st_size != file.size or file_digest(path) != file.sha256:
                raise ReleaseError(
                    f"{path} is not {file.name} of release {release.number}",
                    hint="Copy the release's folder again, or make it again.",
                )
    return release, manifest, signature


def write_release(
    folder: Path, release: Callable[[tuple[ReleaseFile, ...]], Release], wheels: Iterable[Path], key: SigningKey
) -> Release:
    """Make a release's folder: the manifest, its signature, and the wheels by digest. Raises `ReleaseError` if the
    release makes no sense."""
    with storage_errors(f"can't make a release in {folder}"):
        (folder / FILES).mkdir(parents=True, exist_ok=True)
        rows = []
        for wheel in sorted(wheels, key=lambda w: w.name):
            row = ReleaseFile(wheel.name, file_digest(wheel), wheel.stat().st_size)
            write_whole(folder / FILES / row.sha256, wheel.read_bytes())
            rows.append(row)
    return _sign_into(folder, release(tuple(rows)), key)


def write_again(folder: Path, old: Path, key: SigningKey, *, number: int, version: str = "", created: str) -> Release:
    """Make an earlier release again under a new number, to go back to it; the version is the earlier one's by default.
    Raises `ReleaseError` if the earlier release, signed by the same key, is not whole, or the number is not above its
    own."""
    before, _, _ = read_release(old, key.verifying)
    if number <= before.number:
        raise ReleaseError("number of a release", expected=f"above {before.number}, as of {old}", got=number)
    with storage_errors(f"can't make a release in {folder}"):
        (folder / FILES).mkdir(parents=True, exist_ok=True)
        for file in before.files:
            write_whole(folder / FILES / file.sha256, (old / FILES / file.sha256).read_bytes())
    again = replace(before, number=number, version=version or before.version, created=created)
    return _sign_into(folder, again, key)


def _sign_into(folder: Path, release: Release, key: SigningKey) -> Release:
    made = Release.from_bytes(release.to_bytes())
    write_whole(folder / MANIFEST, made.to_bytes())
    write_whole(folder / SIGNATURE, signed(made.to_bytes(), key))
    return made


def _read(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        return file.read(limit + 1)


def _file(where: str, value: object) -> ReleaseFile:
    row = _record(where, value, ("name", "sha256", "size"))
    return ReleaseFile(
        _matching(f"{where}.name", row["name"], _FILE, "the name of a wheel"),
        check.digest(f"{where}.sha256", row["sha256"], error=ProtocolError),
        _whole(f"{where}.size", row["size"], 1, MAX_FILE),
    )


def _record(where: str, value: object, keys: Sequence[str]) -> Mapping[str, Any]:
    body = check.record(where, value, keys, error=ProtocolError)
    check.only(keys, body, where, error=ProtocolError)
    return body


def _label(where: str, value: object) -> str:
    return one_line(check.text(where, value, _MAX_LABEL, error=ProtocolError))


_whole = partial(check.whole, error=ProtocolError)
_matching = partial(check.matching, error=ProtocolError)

"""Releases of the runtime: a manifest of files, and the server's signature of it.

The numbers of releases increase. To go back, an earlier release is made again under a new number: a board refuses
numbers that are not above all that it has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from fedprune.core import records
from fedprune.core.atomic_file import write_atomically
from fedprune.core.disk import file_digest, read_file, storage_errors
from fedprune.core.errors import ReleaseError, SignatureError
from fedprune.core.records import Digest, item_count, number_range, pattern_text, printable_text
from fedprune.core.text import one_line
from fedprune.security.keys import SIGNATURE_BYTES, SigningKey, VerifyingKey
from fedprune.wire.fleet_messages import MAX_MANIFEST_BYTES, MAX_RELEASE_FILES, MAX_RELEASE_NUMBER

# Names in a release's folder.
MANIFEST, SIGNATURE, FILES = "release.json", "release.sig", "files"

# Limits of a release: bytes of a file, of all files, and of all unpacked files. A board checks them before it pulls a
# byte, so that a wrong manifest can't fill its disk.
MAX_FILE_BYTES = 2**30
MAX_BYTES = 2**31
MAX_UNPACKED_BYTES = 2**32

# Domain of the signature, so that signatures for other purposes are invalid here.
_SIGNATURE_PURPOSE = b"fedprune release 1\n"

Label = Annotated[str, printable_text(64)]
Module = Annotated[str, pattern_text(r"[A-Za-z_][A-Za-z0-9_]{0,63}", "the name of a package")]
_NAME_PART = r"[A-Za-z_][A-Za-z0-9_]{0,63}"


@dataclass(frozen=True)
class ReleaseFile:
    """A wheel of a release, stored under its digest."""

    name: Annotated[str, pattern_text(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}\.whl", "the name of a wheel")]
    sha256: Digest
    size: Annotated[int, number_range(1, MAX_FILE_BYTES)]


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

    number: Annotated[int, number_range(1, MAX_RELEASE_NUMBER)]
    version: Label
    python: Annotated[str, pattern_text("cp3[0-9]{1,2}", "a Python such as cp311")]
    machine: Annotated[str, pattern_text("[a-z0-9_]{1,32}", "a processor such as aarch64")]
    entry: Annotated[str, pattern_text(rf"{_NAME_PART}(?:\.{_NAME_PART}){{0,7}}:{_NAME_PART}", "module:function")]
    unpacked: Annotated[int, number_range(0, MAX_UNPACKED_BYTES)]
    files: Annotated[tuple[ReleaseFile, ...], item_count(MAX_RELEASE_FILES, min_items=1)]
    contents: Digest
    launcher: Annotated[int, number_range(1, MAX_RELEASE_NUMBER)] = 1
    created: Label = ""
    system: Annotated[tuple[Module, ...], item_count(32)] = ()
    format: Literal["fedprune.release/1"] = "fedprune.release/1"

    @property
    def size(self) -> int:
        return sum(f.size for f in self.files)

    def to_bytes(self) -> bytes:
        """The manifest, as it is signed."""
        return records.encode_record(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Release:
        """Read a manifest and check all of it. Raises `ReleaseError` if it is too long, not a manifest, or a field
        is invalid."""
        what = "a release's manifest"
        if len(data) > MAX_MANIFEST_BYTES:
            raise ReleaseError(what, expected=f"at most {MAX_MANIFEST_BYTES} bytes", got=len(data))
        release = records.decode_record(cls, data, what, ReleaseError)
        files = release.files
        # Files are stored by digest and installed by name: neither may stand for two of them.
        if len({f.name for f in files}) < len(files) or len({f.sha256 for f in files}) < len(files):
            raise ReleaseError(f"{what}: files", expected="each of them once", got=f"{len(files)} entries")
        if release.size > MAX_BYTES:
            raise ReleaseError(f"{what}: files", expected=f"at most {MAX_BYTES} bytes together", got=release.size)
        # Both are shown in logs and at terminals, where a line break could forge a line.
        return replace(release, version=one_line(release.version), created=one_line(release.created))


def sign_manifest(manifest: bytes, key: SigningKey) -> bytes:
    return key.sign(_SIGNATURE_PURPOSE + manifest)


def is_signed(manifest: bytes, signature: bytes, key: VerifyingKey) -> bool:
    """Whether a manifest's detached signature is this key's; the manifest is not parsed."""
    try:
        key.verify(signature, _SIGNATURE_PURPOSE + manifest)
    except SignatureError:
        return False
    return True


def verified_release(manifest: bytes, signature: bytes, key: VerifyingKey) -> Release:
    """The release of a manifest that the server has signed. Raises `ReleaseError` if the signature isn't the server's,
    or the manifest is invalid."""
    if len(manifest) > MAX_MANIFEST_BYTES or not is_signed(manifest, signature, key):
        raise ReleaseError(
            "the release's signature is not the server's",
            hint=f"This board takes releases of key {key.fingerprint} alone. Have the release made again there.",
        )
    # Parsed only now: nothing that a stranger wrote reaches the parser.
    return Release.from_bytes(manifest)


def read_release(folder: Path, key: VerifyingKey) -> tuple[Release, bytes, bytes]:
    """Read a release's folder, verifying its signature and all files; returns the release, its manifest and the
    signature. Raises `ReleaseError` if the signature isn't this key's, or a file is missing or different."""
    with storage_errors(f"can't read the release in {folder}"):
        manifest = read_file(folder / MANIFEST, MAX_MANIFEST_BYTES)
        signature = read_file(folder / SIGNATURE, SIGNATURE_BYTES)
        release = verified_release(manifest, signature, key)
        for file in release.files:
            path = folder / FILES / file.sha256
            if not path.is_file() or path.stat().st_size != file.size or file_digest(path) != file.sha256:
                raise ReleaseError(
                    f"{path} is not {file.name} of release {release.number}",
                    hint="Copy the release's folder again, or make it again.",
                )
    return release, manifest, signature


def write_release(
    folder: Path, make_release: Callable[[tuple[ReleaseFile, ...]], Release], wheels: Iterable[Path], key: SigningKey
) -> Release:
    """Make a release's folder: the manifest, its signature, and the wheels by digest. Raises `ReleaseError` if the
    release makes no sense."""
    with storage_errors(f"can't make a release in {folder}"):
        (folder / FILES).mkdir(parents=True, exist_ok=True)
        files = []
        for wheel in sorted(wheels, key=lambda w: w.name):
            file = ReleaseFile(wheel.name, file_digest(wheel), wheel.stat().st_size)
            write_atomically(folder / FILES / file.sha256, read_file(wheel))
            files.append(file)
    return _write_manifest(folder, make_release(tuple(files)), key)


def rewrite_release(
    folder: Path, old: Path, key: SigningKey, *, number: int, version: str = "", created: str
) -> Release:
    """Make an earlier release again under a new number, to go back to it; the version is the earlier one's by default.
    Raises `ReleaseError` if the earlier release, signed by the same key, is not whole, or the number is not above its
    own."""
    earlier, _, _ = read_release(old, key.verifying_key)
    if number <= earlier.number:
        raise ReleaseError("number of a release", expected=f"above {earlier.number}, as of {old}", got=number)
    with storage_errors(f"can't make a release in {folder}"):
        (folder / FILES).mkdir(parents=True, exist_ok=True)
        for file in earlier.files:
            write_atomically(folder / FILES / file.sha256, read_file(old / FILES / file.sha256))
    release = replace(earlier, number=number, version=version or earlier.version, created=created)
    return _write_manifest(folder, release, key)


def _write_manifest(folder: Path, release: Release, key: SigningKey) -> Release:
    # Read back as boards read it: a release that they would refuse must not be signed.
    checked = Release.from_bytes(release.to_bytes())
    write_atomically(folder / MANIFEST, checked.to_bytes())
    write_atomically(folder / SIGNATURE, sign_manifest(checked.to_bytes(), key))
    return checked

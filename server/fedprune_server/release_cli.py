"""`fedprune-server release`: make a signed release of the boards' runtime from wheels."""

from __future__ import annotations

import argparse
import time
import zipfile
from pathlib import Path
from typing import Any

from fedprune.disk import storage_errors
from fedprune.errors import ExitCode, ReleaseError
from fedprune.release import Release, ReleaseFile, write_release
from fedprune.signature import private_key


def add_release_command(commands: Any) -> None:
    """Add it to the parser's commands."""
    release = commands.add_parser("release", help="make a signed release of the boards' runtime from wheels")
    release.add_argument("--wheels", type=Path, required=True, metavar="DIR", help="all wheels that it is made of")
    release.add_argument("--number", type=int, required=True, metavar="N", help="above that of every earlier release")
    release.add_argument("--name", default="", metavar="TEXT", help="its version for people (default: the number)")
    release.add_argument("--key", type=Path, required=True, metavar="FILE", help="private Ed25519 key, PEM")
    release.add_argument("--out", type=Path, required=True, metavar="DIR", help="the release's folder")
    release.add_argument("--python", default="cp311", metavar="TAG", help="the boards' Python (default: %(default)s)")
    release.add_argument("--machine", default="aarch64", metavar="NAME", help="as `uname -m` says (default: aarch64)")
    release.add_argument(
        "--system", action="append", default=[], metavar="PACKAGE", help="taken from the boards' own Python; repeatable"
    )
    release.add_argument(
        "--entry", default="fedprune_device.cli:main", metavar="MODULE:FUNCTION", help="default: %(default)s"
    )
    release.set_defaults(run=_release)


def _release(arguments: argparse.Namespace) -> int:
    with storage_errors(f"can't read {arguments.wheels}"):
        wheels = sorted(p for p in arguments.wheels.iterdir() if p.suffix == ".whl")
    if not wheels:
        raise ReleaseError(f"there are no wheels in {arguments.wheels}", hint="`pip download` brings them.")
    unpacked = sum(map(_unpacked, wheels))

    def made(files: tuple[ReleaseFile, ...]) -> Release:
        return Release(
            number=arguments.number,
            version=arguments.name or str(arguments.number),
            python=arguments.python,
            machine=arguments.machine,
            entry=arguments.entry,
            unpacked=unpacked,
            files=files,
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            system=tuple(arguments.system),
        )

    release = write_release(arguments.out, made, wheels, private_key(arguments.key))
    print(f"release {release.number} ({release.version}): {len(release.files)} wheels, {release.size / 1e6:.1f} MB")
    return int(ExitCode.OK)


def _unpacked(wheel: Path) -> int:
    """Bytes that a wheel's files take."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError) as error:
        raise ReleaseError(f"{wheel} is no wheel ({error})") from error

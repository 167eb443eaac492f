"""`fedprune-server release`: make a signed release of the boards' runtime, from wheels or of an earlier one."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from fedprune.core.disk import storage_errors
from fedprune.core.errors import ExitCode, ReleaseError
from fedprune.core.text import amount
from fedprune.releases.release import MANIFEST, Release, ReleaseFile, write_again, write_release
from fedprune.security.keys import SigningKey
from fedprune_device.releases.wheel import Wheel, contents_digest
from fedprune_server.cli.state_option import add_state
from fedprune_server.cli.wheels import check_wheels
from fedprune_server.enrollment.pki import IdentityFolder


def add_release(release: argparse.ArgumentParser) -> None:
    source = release.add_mutually_exclusive_group(required=True)
    source.add_argument("--wheels", type=Path, metavar="DIR", help="all wheels that it is made of")
    source.add_argument(
        "--again", type=Path, metavar="DIR", help="an earlier release, to go back to what it holds under a new number"
    )
    add_state(release, "the folder of `init --state`, whose key signs it")
    release.add_argument("--number", type=int, required=True, metavar="N", help="above that of every earlier release")
    release.add_argument("--name", default="", metavar="TEXT", help="its version for people (default: the number)")
    release.add_argument("--out", type=Path, required=True, metavar="DIR", help="the release's folder")
    release.add_argument("--python", default="cp311", metavar="TAG", help="the boards' Python (default: %(default)s)")
    release.add_argument("--machine", default="aarch64", metavar="NAME", help="as `uname -m` says (default: aarch64)")
    release.add_argument(
        "--system",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="taken from the boards' own Python, so that no wheel of it is needed; repeatable",
    )
    release.add_argument(
        "--entry", default="fedprune_start:device", metavar="MODULE:FUNCTION", help="default: %(default)s"
    )
    release.set_defaults(function=_release)


def _release(arguments: argparse.Namespace) -> int:
    if (arguments.out / MANIFEST).exists():
        raise ReleaseError(f"{arguments.out} holds a release already", hint="Name another folder with --out.")
    with IdentityFolder(arguments.state) as identity:
        key = identity.key
    release = _again(arguments, key) if arguments.again is not None else _of_wheels(arguments, key)
    print(f"release {release.number} ({release.version}): {len(release.files)} wheels, {amount(release.size, 'bytes')}")
    print(f"signed with key {key.verifying.hex}")
    return int(ExitCode.OK)


def _again(arguments: argparse.Namespace, key: SigningKey) -> Release:
    return write_again(
        arguments.out, arguments.again, key, number=arguments.number, version=arguments.name, created=_now()
    )


def _of_wheels(arguments: argparse.Namespace, key: SigningKey) -> Release:
    with storage_errors(f"can't read {arguments.wheels}"):
        wheels = sorted(p for p in arguments.wheels.iterdir() if p.suffix == ".whl")
    if not wheels:
        raise ReleaseError(f"there are no wheels in {arguments.wheels}", hint="`pip download` brings them.")
    opened = [Wheel(path, path.name) for path in wheels]
    check_wheels(wheels, arguments.python, arguments.machine, arguments.system)
    contents = contents_digest(opened)

    def made(files: tuple[ReleaseFile, ...]) -> Release:
        return Release(
            number=arguments.number,
            version=arguments.name or str(arguments.number),
            python=arguments.python,
            machine=arguments.machine,
            entry=arguments.entry,
            unpacked=sum(wheel.size for wheel in opened),
            files=files,
            contents=contents,
            created=_now(),
            system=tuple(arguments.system),
        )

    return write_release(arguments.out, made, wheels, key)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

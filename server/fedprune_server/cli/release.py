"""`fedprune-server release`: make a signed release of the boards' runtime, from wheels or of an earlier one."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from pathlib import Path

from packaging.utils import canonicalize_name

from fedprune.core.cli import print_json
from fedprune.core.disk import storage_errors
from fedprune.core.errors import ReleaseError
from fedprune.core.text import amount
from fedprune.releases.release import MANIFEST, Release, ReleaseFile, rewrite_release, write_release
from fedprune.releases.wheels import check_wheels, installable_tags, marker_environment
from fedprune.security.keys import SigningKey
from fedprune_device.releases.wheel import Wheel, contents_digest
from fedprune_server.enrollment.pki import IdentityFolder

_BOARD_EXTRA = "board"
_OLDEST_GLIBC_MINOR = 35  # of Ubuntu 22.04, the oldest system of a board that has Python 3.10 or newer
# Packages whose module has another name: a release's `system` lists modules, and wheels name packages.
_MODULE_NAMES = {"pillow": "pil", "paho-mqtt": "paho", "onnxruntime-gpu": "onnxruntime"}


def run_release(arguments: argparse.Namespace) -> None:
    if (arguments.out / MANIFEST).exists():
        raise ReleaseError(f"{arguments.out} holds a release already", hint="Name another folder with --out.")
    with IdentityFolder(arguments.state) as identity:
        key = identity.key
    if arguments.again is None:
        release = _release_of_wheels(arguments, key)
    else:
        number, name = arguments.number, arguments.name
        release = rewrite_release(arguments.out, arguments.again, key, number=number, version=name, created=_now())
    if arguments.json:
        body = {"release": release.number, "version": release.version, "wheels": len(release.files)}
        print_json({**body, "bytes": release.size, "key": key.verifying_key.hex})
        return
    print(f"release {release.number} ({release.version}): {len(release.files)} wheels, {amount(release.size, 'bytes')}")
    print(f"signed with key {key.verifying_key.hex}")


def _release_of_wheels(arguments: argparse.Namespace, key: SigningKey) -> Release:
    with storage_errors(f"can't read {arguments.wheels}"):
        wheels = sorted(p for p in arguments.wheels.iterdir() if p.suffix == ".whl")
    if not wheels:
        raise ReleaseError(f"there are no wheels in {arguments.wheels}", hint="`pip download` brings them.")
    # Opening a wheel checks its archive: a truncated download is found here, not on the first board.
    opened_wheels = [Wheel(path, path.name) for path in wheels]
    _check_wheels(wheels, arguments.python, arguments.machine, arguments.system)
    contents = contents_digest(opened_wheels)

    def build_release(files: tuple[ReleaseFile, ...]) -> Release:
        return Release(
            number=arguments.number,
            version=arguments.name or str(arguments.number),
            python=arguments.python,
            machine=arguments.machine,
            entry=arguments.entry,
            unpacked=sum(wheel.size for wheel in opened_wheels),
            files=files,
            contents=contents,
            created=_now(),
            system=tuple(arguments.system),
        )

    return write_release(arguments.out, build_release, wheels, key)


def _check_wheels(wheels: Sequence[Path], python: str, machine: str, system: Sequence[str]) -> None:
    """Raise `ReleaseError` unless wheels run on the boards, include fedprune, and lack nothing.

    `python` is the boards' Python, such as cp311, `machine` their processor as `uname -m` prints it, and `system` has
    modules that are taken from the boards' own Python.
    """
    version = re.fullmatch(r"cp3([0-9]{1,2})", python)
    if version is None:
        raise ReleaseError("--python", expected="a Python such as cp311", got=python)
    minor = int(version[1])
    platforms = [f"manylinux_2_{glibc}_{machine}" for glibc in range(_OLDEST_GLIBC_MINOR, 4, -1)]
    platforms += [f"{tag}_{machine}" for tag in ("manylinux2014", "manylinux2010", "manylinux1", "linux")]
    from_system = {canonicalize_name(name) for name in system}
    check_wheels(
        wheels,
        machine_text=f"{python} on {machine}",
        tags=installable_tags(minor, platforms),
        markers=marker_environment(minor, machine),
        extra=_BOARD_EXTRA,
        provided=lambda name: _MODULE_NAMES.get(name, name) in from_system,
        refuse=ReleaseError,
        hint="`pip download --platform` brings others; --python, --machine and --system say what the boards have.",
    )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

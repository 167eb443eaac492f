"""The wheels of a release, checked before it is signed: each runs on the boards, and its requirements are there.

Otherwise the first board would find the error, after its download.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import Version

from fedprune.core.errors import ReleaseError
from fedprune.releases.wheels import OWN, environment, parsed, supported, unmet

_EXTRA = "board"
_GLIBC = 35  # of Ubuntu 22.04, the oldest system of a board that has Python 3.10 or newer
_MODULES = {"pillow": "pil", "paho-mqtt": "paho", "onnxruntime-gpu": "onnxruntime"}
"""Packages whose module, which is what a release names, is called otherwise."""


def check_wheels(wheels: Sequence[Path], python: str, machine: str, system: Sequence[str] = ()) -> None:
    """Make sure that wheels run on the boards, include fedprune, and lack nothing.

    Args:
        wheels: The files.
        python: The boards' Python, such as cp311.
        machine: Their processor, as `uname -m` prints it.
        system: Modules that are taken from the boards' own Python.

    Raises:
        ReleaseError: A file is not a wheel, is for other boards, or is there twice; or a requirement or fedprune is
            missing.
    """
    version = re.fullmatch(r"cp3([0-9]{1,2})", python)
    if version is None:
        raise ReleaseError("--python", expected="a Python such as cp311", got=python)
    minor = int(version[1])
    platforms = [f"manylinux_2_{glibc}_{machine}" for glibc in range(_GLIBC, 4, -1)]
    platforms += [f"{tag}_{machine}" for tag in ("manylinux2014", "manylinux2010", "manylinux1", "linux")]
    runs = supported(minor, platforms)
    versions: dict[str, Version] = {}
    for wheel in wheels:
        name, found, tags = parsed(wheel, ReleaseError)
        if not tags & runs:
            raise ReleaseError(
                wheel.name,
                expected=f"a wheel for {python} on {machine}",
                got=", ".join(sorted(map(str, tags))[:3]),
                hint="`pip download --platform` brings others; --python and --machine say what the boards have.",
            )
        if name in versions:
            raise ReleaseError(f"wheels of {name}", expected="one", got=f"{versions[name]} and {found}")
        versions[name] = found
    if OWN not in versions:
        raise ReleaseError(
            f"there is no wheel of {OWN} among the {len(wheels)}",
            hint="`python -m build --wheel` in the source code makes dist/fedprune-*.whl: copy it to the others.",
        )
    own = {canonicalize_name(name) for name in system}
    markers = environment(minor, machine)
    for wheel, wanted, there in unmet(wheels, markers, _EXTRA, lambda n: _MODULES.get(n, n) in own, ReleaseError):
        raise ReleaseError(
            f"{wheel.name} requires {wanted.name}{wanted.specifier}",
            expected="a wheel of it",
            got="none" if there is None else there,
            hint="`pip download` it to the others, or name with --system what the boards' own Python has.",
        )

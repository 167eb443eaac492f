"""The wheels of a release, looked at before it is signed: each runs on the boards, and what they require is there.

What is wrong with them would be seen on the first board otherwise, after its download.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Collection, Iterator, Sequence
from email.parser import HeaderParser
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

from fedprune.errors import ReleaseError, reason

OWN = "fedprune"

_EXTRA = "board"
_MAX_METADATA = 4 * 2**20
_GLIBC = 35  # of Ubuntu 22.04, the oldest system of a board that has Python 3.10 or newer
_MODULES = {"pillow": "pil", "paho-mqtt": "paho", "onnxruntime-gpu": "onnxruntime"}
"""Packages whose module, which is what a release names, is called otherwise."""


def check_wheels(wheels: Sequence[Path], python: str, machine: str, system: Sequence[str] = ()) -> None:
    """Make sure that wheels run on the boards, have fedprune among them, and lack nothing.

    Args:
        wheels: The files.
        python: The boards' Python, such as cp311.
        machine: Their processor, as `uname -m` says it.
        system: Modules that are taken from the boards' own Python.

    Raises:
        ReleaseError: One is no wheel, or for other boards, is there twice, or requires what isn't there; or fedprune
            is missing.
    """
    version = re.fullmatch(r"cp3([0-9]{1,2})", python)
    if version is None:
        raise ReleaseError("--python", expected="a Python such as cp311", got=python)
    minor = int(version[1])
    supported = _supported(minor, machine)
    versions: dict[str, Version] = {}
    for wheel in wheels:
        name, found, tags = _parsed(wheel)
        if not tags & supported:
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
    for wheel, wanted, there in _unmet(wheels, versions, minor, machine, own):
        raise ReleaseError(
            f"{wheel.name} requires {wanted.name}{wanted.specifier}",
            expected="a wheel of it",
            got="none" if there is None else there,
            hint="`pip download` it to the others, or name with --system what the boards' own Python has.",
        )


def _unmet(
    wheels: Sequence[Path], versions: dict[str, Version], minor: int, machine: str, own: Collection[str]
) -> Iterator[tuple[Path, Requirement, Version | None]]:
    """What wheels require and don't have: by whom, what, and which version there is instead."""
    environment = {str(k): str(v) for k, v in default_environment().items()}
    environment.update(
        python_version=f"3.{minor}",
        python_full_version=f"3.{minor}.0",
        platform_machine=machine,
        platform_system="Linux",
        sys_platform="linux",
        os_name="posix",
        implementation_name="cpython",
        platform_python_implementation="CPython",
    )
    for wheel in wheels:
        environment["extra"] = _EXTRA if _parsed(wheel)[0] == OWN else ""
        for line in _required(wheel):
            try:
                wanted = Requirement(line)
            except InvalidRequirement as error:
                raise ReleaseError(f"{wheel.name} requires {line!r:.80}, which can't be read") from error
            name = canonicalize_name(wanted.name)
            if (wanted.marker and not wanted.marker.evaluate(environment)) or _MODULES.get(name, name) in own:
                continue
            found = versions.get(name)
            if found is None or not wanted.specifier.contains(found, prereleases=True):
                yield wheel, wanted, found


def _required(wheel: Path) -> list[str]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n)]
            if len(names) != 1 or archive.getinfo(names[0]).file_size > _MAX_METADATA:
                raise ReleaseError(f"{wheel.name} is no wheel", expected="one METADATA", got=len(names))
            text = archive.read(names[0]).decode("utf-8", "replace")
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ReleaseError(f"{wheel.name} is no wheel ({reason(error)})") from error
    return [str(line) for line in HeaderParser().parsestr(text).get_all("Requires-Dist", [])]


def _parsed(wheel: Path) -> tuple[str, Version, frozenset[Tag]]:
    try:
        name, version, _, tags = parse_wheel_filename(wheel.name)
    except InvalidWheelFilename as error:
        raise ReleaseError(f"{wheel.name} is no name of a wheel") from error
    return name, version, tags


def _supported(minor: int, machine: str) -> frozenset[Tag]:
    platforms = [f"manylinux_2_{glibc}_{machine}" for glibc in range(_GLIBC, 4, -1)]
    platforms += [f"{tag}_{machine}" for tag in ("manylinux2014", "manylinux2010", "manylinux1", "linux")]
    return frozenset(cpython_tags((3, minor), platforms=platforms)) | frozenset(
        compatible_tags((3, minor), f"cp3{minor}", platforms)
    )

"""Checks of wheels for another machine: their names, metadata and missing requirements.

Servers check a release's wheels with them, and kits theirs; each passes its own error class as `refuse`. They need the
package `packaging`, which boards don't have.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from email.parser import HeaderParser
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

from fedprune.core.errors import FedpruneError, error_reason
from fedprune.core.zip_limits import read_member

# This project's package, whose extra names a board's requirements.
OWN_PACKAGE = "fedprune"

# Bytes of a wheel's metadata; it is read whole, also from archives that lie about their size.
_MAX_METADATA_BYTES = 4 * 2**20

ErrorClass = type[FedpruneError]


def parse_wheel_name(wheel: Path, refuse: ErrorClass) -> tuple[str, Version, frozenset[Tag]]:
    """Name, version and tags in a wheel's file name. Raises `FedpruneError` as `refuse`: it is no such name."""
    try:
        name, version, _, tags = parse_wheel_filename(wheel.name)
    except (InvalidWheelFilename, ValueError) as error:  # the latter of numbers that are too long
        raise refuse(f"{wheel.name} is no name of a wheel") from error
    return name, version, tags


def installable_tags(minor: int, platforms: Sequence[str]) -> frozenset[Tag]:
    """Tags of wheels that run on a CPython 3.`minor` of some platforms."""
    return frozenset(cpython_tags((3, minor), platforms=platforms)) | frozenset(
        compatible_tags((3, minor), f"cp3{minor}", platforms)
    )


def marker_environment(minor: int, machine: str) -> dict[str, str]:
    """The environment of markers on Linux with CPython 3.`minor` and a processor as of `uname -m`."""
    markers = {str(k): str(v) for k, v in default_environment().items()}
    markers.update(
        python_version=f"3.{minor}",
        python_full_version=f"3.{minor}.0",
        platform_machine=machine,
        platform_system="Linux",
        sys_platform="linux",
        os_name="posix",
        implementation_name="cpython",
        platform_python_implementation="CPython",
    )
    return markers


def check_wheels(
    wheels: Sequence[Path],
    *,
    machine_text: str,
    tags: frozenset[Tag],
    markers: dict[str, str],
    extra: str,
    provided: Callable[[str], bool],
    refuse: ErrorClass,
    hint: str,
) -> dict[str, Version]:
    """Make sure that wheels run on a machine of these `tags`, include fedprune once, and lack nothing; returns their
    versions by name. Raises `refuse`, which names the wheel; the others as for `unmet_requirements`, and `hint` says
    how to get another wheel."""
    versions: dict[str, Version] = {}
    for wheel in wheels:
        name, version, wheel_tags = parse_wheel_name(wheel, refuse)
        if not wheel_tags & tags:
            got = ", ".join(sorted(map(str, wheel_tags))[:3])
            raise refuse(wheel.name, expected=f"a wheel for {machine_text}", got=got, hint=hint)
        if name in versions:
            raise refuse(f"wheels of {name}", expected="one", got=f"{versions[name]} and {version}")
        versions[name] = version
    if OWN_PACKAGE not in versions:
        raise refuse(
            f"there is no wheel of {OWN_PACKAGE} among the {len(wheels)}",
            hint="`python -m build --wheel` in the source code makes dist/fedprune-*.whl: put it there, too.",
        )
    for wheel, requirement, present in unmet_requirements(wheels, markers, extra, provided, refuse):
        raise refuse(
            f"{wheel.name} requires {requirement.name}{requirement.specifier} on {machine_text}",
            expected="a wheel of it",
            got="none" if present is None else present,
            hint=hint,
        )
    return versions


def unmet_requirements(
    wheels: Sequence[Path], markers: dict[str, str], extra: str, provided: Callable[[str], bool], refuse: ErrorClass
) -> Iterator[tuple[Path, Requirement, Version | None]]:
    """The missing requirements of wheels: the requiring wheel, the requirement, and the version found instead.

    `provided` tells whether the machine has a package, by its canonical name, without a wheel; `refuse` is raised where
    a file is no wheel, or requires something that can't be read.
    """
    versions = {name: version for name, version, _ in (parse_wheel_name(wheel, refuse) for wheel in wheels)}
    for wheel in wheels:
        environment_of_wheel = markers | {"extra": extra if parse_wheel_name(wheel, refuse)[0] == OWN_PACKAGE else ""}
        for line in wheel_requirements(wheel, refuse):
            try:
                requirement = Requirement(line)
            except InvalidRequirement as error:
                raise refuse(f"{wheel.name} requires {line!r:.80}, which can't be read") from error
            name = canonicalize_name(requirement.name)
            if (requirement.marker and not requirement.marker.evaluate(environment_of_wheel)) or provided(name):
                continue
            version = versions.get(name)
            # A pre-release that somebody put there on purpose satisfies a requirement.
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                yield wheel, requirement, version


def wheel_requirements(wheel: Path, refuse: ErrorClass) -> list[str]:
    """A wheel's requirements, by its metadata. Raises `refuse` if the file is not a wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n)]
            if len(names) != 1:
                raise refuse(f"{wheel.name} is no wheel", expected="one METADATA", got=len(names))
            raw = read_member(archive, archive.getinfo(names[0]), _MAX_METADATA_BYTES, refuse)
            text = raw.decode("utf-8", "replace")
    except refuse:
        raise
    except Exception as error:  # what is damaged makes zipfile and zlib raise many things
        raise refuse(f"{wheel.name} is no wheel ({error_reason(error)})") from error
    return [str(line) for line in HeaderParser().parsestr(text).get_all("Requires-Dist", [])]

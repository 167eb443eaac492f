"""The lock files agree with pyproject.toml and constraints.txt, and have a sha256 for every package."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedprune.core.toml_file import parse_toml
from support.paths import ROOT
from support.processes.compose_file import DEPLOY

LOCKS = DEPLOY / "locks"
BOARD = ROOT / "device_runtime/fedprune_flash/kit/board_wheels.txt"
VERSIONS = DEPLOY / "constraints.txt"

TARGETS = [(python, machine) for python in ("3.10", "3.11", "3.12", "3.13") for machine in ("x86_64", "aarch64")]
"""The Pythons and processors of boards; servers begin with 3.11."""

IMAGE = ("server", "console", "notify", "privacy", "tracing")
NOT_LISTED = {"dev", "docs", "figures", "flower", "jetson", "subflot", "torch"}
"""Extras whose packages no release lists: those of the project itself, and those that are large or the user's own."""


@dataclass(frozen=True)
class Lock:
    """A file of pinned versions: its path, the extras and further requirements that it has, and its oldest Python."""

    path: Path
    extras: tuple[str, ...]
    given: Path | None = None
    oldest: str = "3.11"
    hashed: bool = True

    @property
    def targets(self) -> list[tuple[str, str]]:
        return TARGETS[[python for python, _ in TARGETS].index(self.oldest) :]


def makefile_extras() -> tuple[str, ...]:
    (row,) = re.findall(r"^EXTRAS \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return tuple(row.split(","))


FILES = [
    Lock(VERSIONS, makefile_extras(), hashed=False),
    Lock(LOCKS / "server.txt", IMAGE, LOCKS / "server.in"),
    Lock(LOCKS / "build.txt", (), LOCKS / "build.in"),
    Lock(BOARD, ("board",), oldest="3.10"),
]
every_lock = pytest.mark.parametrize("lock", FILES, ids=lambda lock: lock.path.name)


def rows(path: Path) -> list[str]:
    """The requirements of a file, each in one line with its hashes."""
    text = re.sub(r"^\s*#.*$", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [" ".join(row.split()) for row in text.splitlines() if row.strip()]


def holds(marker: Marker | None, python: str, machine: str, extra: str = "") -> bool:
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "platform_machine": machine,
        "sys_platform": "linux",
        "os_name": "posix",
        "platform_system": "Linux",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": extra,
    }
    return marker is None or marker.evaluate(environment)


def pins(lines: Iterable[str], python: str, machine: str) -> dict[str, str]:
    """Versions by package for a Python and processor; no package has two."""
    versions: dict[str, str] = {}
    for line in lines:
        pin = Requirement(line.partition(" --hash")[0])
        if holds(pin.marker, python, machine):
            (only,) = pin.specifier
            assert only.operator == "=="
            assert canonicalize_name(pin.name) not in versions, pin.name
            versions[canonicalize_name(pin.name)] = only.version
    return versions


def requirements_of(extras: Sequence[str], python: str, machine: str) -> list[Requirement]:
    """What pyproject.toml requires with these extras, those that they name included."""
    project = parse_toml((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [Requirement(text) for text in project["dependencies"]]
    for extra in extras:
        for requirement in map(Requirement, project["optional-dependencies"][extra]):
            if requirement.name == "fedprune":
                requirements += requirements_of(sorted(requirement.extras), python, machine)
            else:
                requirements.append(requirement)
    return [requirement for requirement in requirements if holds(requirement.marker, python, machine)]


@every_lock
def test_a_lock_has_what_is_required(lock: Lock) -> None:
    constraints = [Requirement(row) for row in rows(lock.given)] if lock.given else []
    for target in lock.targets:
        locked = pins(rows(lock.path), *target)
        required = [*constraints, *(requirements_of(lock.extras, *target) if lock.extras else [])]
        missing = [r for r in required if not r.specifier.contains(locked.get(canonicalize_name(r.name), "0"))]
        assert len(required) > 2
        assert missing == [], "make pins"


@every_lock
def test_a_lock_has_the_versions_of_the_tests(lock: Lock) -> None:
    tested = rows(ROOT / "constraints.txt")
    for target in lock.targets:
        expected = pins(tested, *target)
        locked = pins(rows(lock.path), *target)
        shared = expected.keys() & locked.keys()
        assert len(shared) > 3
        assert {name: locked[name] for name in shared} == {name: expected[name] for name in shared}, "make pins"


@pytest.mark.parametrize("lock", [lock for lock in FILES if lock.hashed], ids=lambda lock: lock.path.name)
def test_every_package_of_a_lock_has_a_sha256(lock: Lock) -> None:
    for row in rows(lock.path):
        assert re.fullmatch(r"\S+==\S+( ; .*?)?( --hash=sha256:[0-9a-f]{64})+", row), row[:80]


def test_the_image_of_a_server_has_the_versions_that_a_release_lists() -> None:
    for target in FILES[0].targets:
        assert pins(rows(LOCKS / "server.txt"), *target).items() <= pins(rows(VERSIONS), *target).items(), "make pins"


def test_a_release_lists_every_extra_of_users() -> None:
    extras = parse_toml((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(makefile_extras()) == extras.keys() - NOT_LISTED


TOOL = """#!/bin/sh
case "$0 $*" in
*/python*)
    while [ "$1" != --outdir ]; do shift; done
    touch "$2/fedprune-1-py3-none-any.whl" "$2/fedprune-1.tar.gz" ;;
*/pip*) test -z "$CHANGES" || echo "$CHANGES" >>dist/fedprune-1-py3-none-any.whl ;;
*) while [ "$1" != --output-file ]; do shift; done; echo listed >"$2" ;;
esac
"""


@pytest.mark.parametrize("changes", ["", "x"])
def test_a_release_whose_wheel_changes_while_packages_are_fetched_for_its_list_is_none(
    tmp_path: Path, changes: str
) -> None:
    (tmp_path / "deploy/locks").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "deploy/locks/build.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    (tmp_path / "tools/bin").mkdir(parents=True)
    for name in ("python", "pip", "cyclonedx-py"):
        (tmp_path / "tools/bin" / name).write_text(TOOL)
        (tmp_path / "tools/bin" / name).chmod(0o755)
    (tmp_path / "tools/installed").touch()
    environment = {**os.environ, "CHANGES": changes}
    done = subprocess.run(
        ["make", "release", "TOOLS=tools"], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    sums = tmp_path / "dist/SHA256SUMS"
    assert (done.returncode == 0, sums.exists()) == ((False, False) if changes else (True, True)), done.stderr
    if not changes:
        subprocess.run(["sha256sum", "--check", "--strict", sums.name], cwd=sums.parent, check=True)
        assert len(sums.read_text().splitlines()) == 3

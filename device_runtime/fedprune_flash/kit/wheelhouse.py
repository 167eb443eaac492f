"""A wheelhouse: all wheels that a board needs, fetched for its Python and processor instead of this machine's.

pip downloads for another platform, but evaluates markers such as `python_version < "3.11"` for the Python that runs it.
Therefore the wheels are checked again here: each must run on the target, with all its requirements.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess  # nosec B404  # lists of words, never a shell
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement

from fedprune.core.disk import file_digest
from fedprune.core.errors import KitError, StorageFullError
from fedprune.core.imports import module_code
from fedprune.releases.wheels import (
    OWN_PACKAGE,
    check_wheels,
    installable_tags,
    marker_environment,
    parse_wheel_name,
    unmet_requirements,
)
from fedprune_flash.kit.target import BoardTarget

# Packages that JetPack brings, built for its GPU and for each other: a wheel of the same name would shadow them.
JETPACK_PROJECTS = ("numpy", "onnxruntime", "onnxruntime-gpu", "opencv-python", "tensorrt", "torch")

# The lock file: the version and the sha256 of every wheel that a kit may download.
BOARD_WHEELS_LOCK = Path(__file__).with_name("board_wheels.txt")

_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")
_MAX_ERROR_LINES = 3  # lines of pip's error output that a message quotes: the last ones name the reason
# Downloads until no requirement is missing: each one may bring wheels with requirements of their own.
_MAX_DOWNLOADS = 5


def source_folder() -> Path | None:
    """The folder of the source code that runs; None if fedprune is installed from a wheel."""
    for folder in Path(__file__).resolve().parents:
        if (folder / "pyproject.toml").is_file() and (folder / "device_runtime" / "fedprune_flash").is_dir():
            return folder
    return None


def build_wheel(out: Path) -> Path:
    """Build fedprune's own wheel from the checkout that runs."""
    source = source_folder()
    if source is None:
        raise KitError(
            "there is no source code to build a wheel from",
            hint="Name fedprune's wheel with --wheel, or install fedprune from a clone with pip install -e.",
        )
    _pip("wheel", "--no-deps", "--wheel-dir", str(out), str(source))
    return own_wheel(out)


def own_wheel(folder: Path) -> Path:
    wheels = sorted(p for p in folder.glob("*.whl") if parse_wheel_name(p, KitError)[0] == OWN_PACKAGE)
    if len(wheels) != 1:
        raise KitError(f"wheels of fedprune in {folder}", expected="one", got=len(wheels))
    return wheels[0]


def fetch_wheels(wheel: Path, target: BoardTarget, out: Path, links: Sequence[Path] = ()) -> None:
    """Fetch the wheels that a board needs into a folder, except the packages of its own Python.

    From a network only files of the lock file are taken, so that kits are reproducible; `links` are folders with
    wheels, in place of a network. Raises `KitError`.
    """
    platforms = [word for tag in target.platforms for word in ("--platform", tag)]
    kind = ["--implementation", "cp", "--python-version", target.python, "--only-binary=:all:"]
    requirements = [f"{wheel}[{target.extra}]"]
    with tempfile.TemporaryDirectory() as folder:
        sources = ["--no-index", *(p for link in links for p in ("--find-links", str(link)))]
        if not links:
            constraints_file = Path(folder) / BOARD_WHEELS_LOCK.name
            constraints_file.write_text("".join(f"{line}\n" for line in locked_requirements(target)), encoding="utf-8")
            sources = ["--constraint", str(constraints_file)]
        for _ in range(_MAX_DOWNLOADS):
            _pip("download", *sources, *platforms, *kind, "--dest", str(out), *requirements)
            # pip leaves out requirements whose markers hold only on the target.
            wheels = sorted(out.glob("*.whl"))
            # The installer checks the board's own packages.
            unmet = unmet_requirements(
                wheels, _marker_environment(target), target.extra, target.system_packages.__contains__, KitError
            )
            requirements = sorted({f"{r.name}{r.specifier}" for _, r, actual in unmet if actual is None})
            if not requirements:
                break
    locked_digests = set(_HASH.findall(BOARD_WHEELS_LOCK.read_text(encoding="ascii")))
    for path in out.glob("*.whl"):
        name = parse_wheel_name(path, KitError)[0]
        if name in target.system_packages:
            path.unlink()
        elif not links and name != OWN_PACKAGE and (actual := file_digest(path)) not in locked_digests:
            raise KitError(
                f"{path.name} from the network", expected=f"a file of {BOARD_WHEELS_LOCK.name}", got=f"sha256 {actual}",
                hint="The index may have been tampered with. Wheels of your own are given with --find-links.",
            )  # fmt: skip


def locked_requirements(target: BoardTarget) -> list[str]:
    """The versions of the lock file for a target."""
    environment, versions = _marker_environment(target), []
    for line in BOARD_WHEELS_LOCK.read_text(encoding="ascii").splitlines():
        if not line or line.startswith(("#", " ")):
            continue
        requirement = Requirement(line.rstrip(" \\"))
        if requirement.marker is None or requirement.marker.evaluate(environment):
            versions.append(f"{requirement.name}{requirement.specifier}")
    return versions


def check_wheelhouse(wheels: Sequence[Path], target: BoardTarget) -> None:
    """Make sure that the wheels run on the target and lack nothing; raises `KitError`, which names the wheel."""
    versions = check_wheels(
        wheels,
        machine_text=str(target),
        tags=installable_tags(target.version[1], [*target.platforms, f"linux_{target.architecture}"]),
        markers=_marker_environment(target),
        extra=target.extra,
        provided=target.system_packages.__contains__,
        refuse=KitError,
        hint="Add a wheel of it to the folder of --find-links, or let pip fetch it.",
    )
    for name in (name for name in JETPACK_PROJECTS if target.jetson and name in versions):
        raise KitError(
            f"{name} in a kit for a Jetson",
            expected="the board's own",
            got=versions[name],
            hint="A plain wheel would be found before JetPack's, which knows the GPU.",
        )


def _marker_environment(target: BoardTarget) -> dict[str, str]:
    return marker_environment(target.version[1], target.architecture)


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-c", module_code("pip"), "--disable-pip-version-check", "--quiet", *arguments]
    result = subprocess.run(  # noqa: S603  # nosec B603  # pip, with names that our own metadata says
        command, capture_output=True, text=True, check=False, env={**os.environ, "PIP_NO_INPUT": "1"}, timeout=3600
    )
    if result.returncode and os.strerror(errno.ENOSPC) in result.stderr:
        raise StorageFullError(
            f"pip {arguments[0]} found no room: {os.strerror(errno.ENOSPC)}",
            hint=f"Free some space in the kit's folder and in {tempfile.gettempdir()}.",
        )
    if result.returncode:
        error_text = " ".join(result.stderr.strip().splitlines()[-_MAX_ERROR_LINES:])
        raise KitError(
            f"pip {arguments[0]} failed: {error_text[:600] or result.returncode}",
            hint="Downloading for another Python needs pip 24.1 or newer. Without a network, give a folder of "
            "wheels with --find-links.",
        )

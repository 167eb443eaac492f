"""Checks whether a release is for this board, and whether the board's own Python has what the release takes from it."""

from __future__ import annotations

import platform
import subprocess  # nosec B404  # lists of words, never a shell
import sys
from collections.abc import Collection

from fedprune.core.errors import ReleaseError, StorageError
from fedprune.releases.release import Release
from fedprune_device.launcher.launcher import VERSION

_PYTHON_TIMEOUT_S = 120.0  # for a question to the board's Python, which may take a minute from a slow card


def check_release(release: Release, highest: int) -> None:
    """Make sure that a release is for this board and above the `highest` staged number; otherwise `ReleaseError`."""
    required = {"python": f"cp{sys.version_info.major}{sys.version_info.minor}", "machine": platform.machine()}
    for name, value in required.items():
        if getattr(release, name) != value:
            raise ReleaseError(f"release {release.number}: {name}", expected=value, got=getattr(release, name))
    if release.number <= highest:
        raise ReleaseError(
            f"release {release.number}",
            expected=f"a number above {highest}",
            hint="To go back, release the earlier one again under a new number.",
        )
    if release.launcher > VERSION:
        raise ReleaseError(
            f"release {release.number}: launcher",
            expected=f"at most {VERSION}",
            got=release.launcher,
            hint="Set this board up again.",
        )


def check_packages_on_board(release: Release) -> None:
    """Make sure that the board's own Python has what a release takes from it; this may take minutes."""
    lacking = sorted(set(release.system) - packages_on_board(release.system))
    if lacking:
        raise ReleaseError(
            f"release {release.number} needs {', '.join(lacking)} of the board's own Python, which lacks it",
            hint="Install it there, or make a release that brings it.",
        )


def packages_on_board(names: Collection[str]) -> frozenset[str]:
    """The packages among `names` that the board's own Python has. This may take minutes."""
    if not names:
        return frozenset()
    code = "import sys, importlib.util as u; print(*[n for n in sys.argv[1:] if u.find_spec(n)])"
    # -I ignores PYTHONPATH, which names the running slot: only the board's own packages count.
    command = [sys.executable, "-I", "-c", code, *sorted(names)]
    message = f"can't ask {sys.executable} for its packages"
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=_PYTHON_TIMEOUT_S, check=False)  # noqa: S603  # nosec B603  # our own line, in this Python; the names are arguments
    except subprocess.TimeoutExpired as error:
        raise StorageError(message, expected=f"an answer within {_PYTHON_TIMEOUT_S:g} s", got="none") from error
    except (OSError, UnicodeError) as error:
        raise StorageError(message, got=error) from error
    if process.returncode:
        raise StorageError(message, got=process.stderr[-200:])
    return frozenset(process.stdout.split())

"""Checks whether a release is for this board: its number, Python, processor, launcher and the packages that it lacks.

A process of its own finds out which packages the board's own Python has. On a busy board that may take minutes, so it
is never done in the loop that feeds the watchdog.
"""

from __future__ import annotations

import subprocess  # nosec B404  # lists of words, never a shell
import sys
from collections.abc import Collection, Mapping

from fedprune.core.errors import ReleaseError, StorageError
from fedprune.releases.release import Release
from fedprune_device.launcher import launcher

_ANSWER_S = 120.0


def check_release(release: Release, highest: int, board: Mapping[str, str]) -> None:
    """Make sure that a release is for this board; raises `ReleaseError`.

    `highest` is the highest number that was ever staged, `board` the required `python` and `machine`.
    """
    if release.number <= highest:
        raise ReleaseError(
            f"release {release.number}",
            expected=f"a number above {highest}",
            hint="To go back, release the earlier one again under a new number.",
        )
    for name, value in board.items():
        if getattr(release, name) != value:
            raise ReleaseError(f"release {release.number}: {name}", expected=value, got=getattr(release, name))
    if release.launcher > launcher.VERSION:
        raise ReleaseError(
            f"release {release.number}: launcher",
            expected=f"at most {launcher.VERSION}",
            got=release.launcher,
            hint="Set this board up again.",
        )


def check_packages_on_board(release: Release) -> None:
    """Make sure that the board's own Python has what a release takes from it. This may take minutes."""
    lacking = sorted(set(release.system) - own_packages(release.system))
    if lacking:
        raise ReleaseError(
            f"release {release.number} needs {', '.join(lacking)} of the board's own Python, which lacks it",
            hint="Install it there, or make a release that brings it.",
        )


def own_packages(names: Collection[str]) -> frozenset[str]:
    """Those of some packages that the board's own Python has. This may take minutes."""
    if not names:
        return frozenset()
    code = "import sys, importlib.util as u; print(*[n for n in sys.argv[1:] if u.find_spec(n)])"
    command = [sys.executable, "-I", "-c", code, *sorted(names)]
    asked = f"can't ask {sys.executable} for its packages"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=False)  # noqa: S603  # nosec B603  # our own line, in this Python; the names are arguments
    except subprocess.TimeoutExpired as error:
        raise StorageError(asked, expected=f"an answer within {_ANSWER_S:g} s", got="none") from error
    except (OSError, UnicodeError) as error:
        raise StorageError(asked, got=error) from error
    if done.returncode:
        raise StorageError(asked, got=done.stderr[-200:])
    return frozenset(done.stdout.split())

"""Whether a release is one for this board: its number, Python, processor, launcher, and what it takes from it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection, Mapping

from fedprune.errors import ReleaseError, StorageError
from fedprune.release import Release
from fedprune_device.runtime import launcher


def admit(release: Release, highest: int, board: Mapping[str, str]) -> None:
    """Make sure that a release is for this board.

    Args:
        release: The release.
        highest: The highest number that was ever staged here.
        board: What `python` and `machine` of a release must be.

    Raises:
        ReleaseError: It isn't; the message says why.
        StorageError: The board's Python can't be asked for its packages.
    """
    if release.number <= highest:
        raise ReleaseError(
            f"release {release.number}",
            expected=f"a number above {highest}",
            hint="What is to be gone back to is released once more, under a new number.",
        )
    for name, value in board.items():
        if getattr(release, name) != value:
            raise ReleaseError(f"release {release.number}: {name}", expected=value, got=getattr(release, name))
    if release.launcher > launcher.VERSION:
        raise ReleaseError(
            f"release {release.number}: launcher",
            expected=f"at most {launcher.VERSION}",
            got=release.launcher,
            hint="This board must be set up anew.",
        )
    lacking = sorted(set(release.system) - own_packages(release.system))
    if lacking:
        raise ReleaseError(
            f"release {release.number} needs {', '.join(lacking)} of the board's own Python, which lacks it",
            hint="Install it there, or make a release that brings it.",
        )


def own_packages(names: Collection[str]) -> frozenset[str]:
    """Which of some packages the board's Python has without any slot.

    Args:
        names: Names of packages.

    Raises:
        StorageError: The interpreter can't be started.
    """
    if not names:
        return frozenset()
    code = "import sys, importlib.util as u; print(*[n for n in sys.argv[1:] if u.find_spec(n)])"
    command = [sys.executable, "-I", "-c", code, *sorted(names)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise StorageError(f"can't ask {sys.executable} for its packages", got=done.stderr[-200:])
    return frozenset(done.stdout.split())

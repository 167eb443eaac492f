"""Loads a module of an unpacked runtime in a process of its own, to see whether the launcher could start it.

An instruction that the processor lacks would kill this process; there it ends only the probe.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess  # nosec B404  # lists of words, never a shell
from pathlib import Path

from fedprune.core.errors import KitError, RuntimeUnavailableError
from fedprune_device.launcher.slot_store import Owner

_MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,80}")
_VERSION = re.compile(r"\d{1,4}(\.\d{1,4}){0,3}")
_TIMEOUT_S = 300.0
_PROGRAM = """
import sys
from importlib import import_module
sys.path[:] = [p for p in sys.path if p]
print("version", getattr(import_module(sys.argv[1]), "__version__", ""))
"""


def load_module(slot: Path, module: str, min_version: str, python: str, owner: Owner | None, hint: str) -> None:
    """Load a module of a slot as `owner`, the service's user; None for this user.

    Raises `RuntimeUnavailableError`, with the hint, if it can't be loaded or is older than `min_version` (empty: any).
    """
    if not _MODULE.fullmatch(module):
        raise KitError(f"the kit names a module {module[:60]!r}", hint="Make the kit again.")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(slot), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONNOUSERSITE": "1"}
    user, group = owner or (None, None)
    try:
        result = subprocess.run(  # noqa: S603  # nosec B603  # our own lines; the module's name is checked above
            [python, "-c", _PROGRAM, module],
            capture_output=True, text=True, check=False, env=environment, cwd="/", timeout=_TIMEOUT_S,
            user=user, group=group, extra_groups=None if user is None else [],
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RuntimeUnavailableError(f"{module} doesn't load within {_TIMEOUT_S:g} s") from error
    if result.returncode == -signal.SIGILL:
        raise RuntimeUnavailableError(
            f"{module} uses instructions that this processor lacks", hint="Take another version of it."
        )
    if result.returncode:
        error_text = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        raise RuntimeUnavailableError(f"{module} can't be loaded: {error_text[:300]}", hint=hint)
    version = next((line[8:] for line in result.stdout.splitlines() if line.startswith("version ")), "")
    if min_version and _version_numbers(version) < _version_numbers(min_version):
        raise RuntimeUnavailableError(
            f"the board's own {module}",
            expected=f"{min_version} or newer",
            got=version or "an unknown version",
            hint=hint,
        )


def _version_numbers(version: str) -> tuple[int, ...]:
    match = _VERSION.match(version)
    return tuple(int(number) for number in match[0].split(".")) if match else ()

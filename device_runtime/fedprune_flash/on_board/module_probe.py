"""Tries an unpacked runtime in a process of its own: whether the launcher could start it, and where it computes.

An instruction that the processor lacks would kill this process; there it ends only the probe.
"""

from __future__ import annotations

import grp
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
# A second: only a kernel that runs shows that a GPU computes.
_GPU_PROGRAM = """
import sys
sys.path[:] = [p for p in sys.path if p]
from fedprune_device.hardware.probe import probe
print("reason", probe(seconds=0.2, layer_seconds=0, cuda=True).cpu_reason)
"""
# Those of the service's unit, whose members may use the GPU's device files.
_GPU_GROUPS = ("video", "render")


def load_module(slot: Path, module: str, min_version: str, python: str, owner: Owner | None, hint: str) -> None:
    """Load a module of a slot as `owner`, the service's user; None for this user.

    Raises `RuntimeUnavailableError`, with the hint, if it can't be loaded or is older than `min_version` (empty: any).
    """
    if not _MODULE.fullmatch(module):
        raise KitError(f"the kit names a module {module[:60]!r}", hint="Make the kit again.")
    result = _run_program(_PROGRAM, module, slot=slot, python=python, owner=owner)
    if result is None:
        raise RuntimeUnavailableError(f"{module} doesn't load within {_TIMEOUT_S:g} s")
    if result.returncode == -signal.SIGILL:
        raise RuntimeUnavailableError(
            f"{module} uses instructions that this processor lacks", hint="Take another version of it."
        )
    if result.returncode:
        raise RuntimeUnavailableError(f"{module} can't be loaded: {_last_error(result)}", hint=hint)
    version = next((line[8:] for line in result.stdout.splitlines() if line.startswith("version ")), "")
    if min_version and _version_numbers(version) < _version_numbers(min_version):
        raise RuntimeUnavailableError(
            f"the board's own {module}",
            expected=f"{min_version} or newer",
            got=version or "an unknown version",
            hint=hint,
        )


def gpu_failure(slot: Path, python: str, owner: Owner | None) -> str:
    """Why the runtime of a slot would compute on the processor though the board has a GPU; empty if the GPU works."""
    result = _run_program(_GPU_PROGRAM, slot=slot, python=python, owner=owner, groups=_GPU_GROUPS)
    if result is None:
        return f"a small net isn't trained within {_TIMEOUT_S:g} s"
    if result.returncode:
        return _last_error(result)
    return next((line[7:] for line in result.stdout.splitlines() if line.startswith("reason ")), "")


def _run_program(
    program: str, *arguments: str, slot: Path, python: str, owner: Owner | None, groups: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str] | None:
    """Run a program with a slot's packages as `owner`, in these groups where the system has them; None if it hangs."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(slot), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONNOUSERSITE": "1"}
    user, group = owner or (None, None)
    extra_groups = [entry.gr_gid for entry in grp.getgrall() if entry.gr_name in groups]
    try:
        return subprocess.run(  # noqa: S603  # nosec B603  # our own lines; a module's name is checked
            [python, "-c", program, *arguments],
            capture_output=True, text=True, check=False, env=environment, cwd="/", timeout=_TIMEOUT_S,
            user=user, group=group, extra_groups=None if user is None else extra_groups,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None


def _last_error(result: subprocess.CompletedProcess[str]) -> str:
    return (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1][:300]


def _version_numbers(version: str) -> tuple[int, ...]:
    match = _VERSION.match(version)
    return tuple(int(number) for number in match[0].split(".")) if match else ()

"""Programs that know the file systems of images, as a plain user and without a mount: mtools and debugfs.

An image may be damaged, or made to harm: the output of such a program is read up to a limit, for a limited time.
"""

from __future__ import annotations

import os
import shutil
import subprocess  # nosec B404  # lists of words, never a shell
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, cast

from fedprune.core.errors import MissingExtraError

_PACKAGES = {"mtools": ("mdir", "mcopy", "mtype", "mmd"), "e2fsprogs": ("debugfs",)}
_MAX_ERROR_BYTES = 2000  # bytes of a program's error output, of which a message shows a line
_TIMEOUT_S = 60.0  # listing or reading takes far less; a damaged file system can make a program loop


@dataclass(frozen=True)
class ProgramOutput:
    """The output of a program. `is_cut`: it printed more than the limit, and was killed."""

    status: int
    output: bytes
    error: str
    is_cut: bool


def check_programs() -> None:
    """Raise `MissingExtraError` where a program is not installed."""
    for package, programs in _PACKAGES.items():
        for program in programs:
            if _path_of(program) is None:
                hint = f"Install {package}: sudo apt-get install {package}."
                raise MissingExtraError(f"{program} is missing", hint=hint)


def run_program(
    program: str, words: Sequence[str], limit: int, *, environment: Mapping[str, str] | None = None, file: int = -1
) -> ProgramOutput:
    """Run a program and read at most `limit` bytes of its output; it inherits the open `file`, if there is one."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(  # noqa: S603  # nosec B603  # a program of mtools or e2fsprogs, with an image's path
            [_path_of(program) or program, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
            env={**os.environ, **(environment or {})}, pass_fds=() if file < 0 else (file,),
        )  # fmt: skip
        with process, cast(IO[bytes], process.stdout) as stream:
            timer = threading.Timer(_TIMEOUT_S, process.kill)
            timer.start()
            output = stream.read(limit + 1)
            timer.cancel()
            if len(output) > limit:
                process.kill()
        errors.seek(0)
        error = errors.read(_MAX_ERROR_BYTES).decode("utf-8", "replace")
    return ProgramOutput(process.returncode, output[:limit], error, len(output) > limit)


def _path_of(program: str) -> str | None:
    # On Debian debugfs is where a plain user's path doesn't lead.
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")

"""What a program answers to a shell that asks for completions, by argcomplete's protocol."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Completed:
    """Attributes:
    words: What the line may go on with.
    imported: Modules that were imported for it.
    """

    words: list[str]
    imported: set[str]


def completed(line: str, folder: Path, **environment: str) -> Completed:
    """Ask for completions at the end of a command line.

    Args:
        folder: Where the line is typed.
        environment: Variables of the shell.
    """
    pytest.importorskip("argcomplete", reason="the extra completion is not installed")
    program = line.partition(" ")[0]
    entry = program.partition("-")[2] or "main"
    answer = folder / ".completions"
    asked = {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9",
    }  # fmt: skip
    code = f"import sys; sys.argv = [{program!r}]; import fedprune_start; sys.exit(fedprune_start.{entry}())"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code],
        cwd=folder, env={**os.environ, **asked, **environment}, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout == ""
    imported = {text.rpartition("|")[2].strip() for text in done.stderr.splitlines() if text.startswith("import time:")}
    return Completed([word.rstrip() for word in answer.read_text().split("\n") if word], imported)

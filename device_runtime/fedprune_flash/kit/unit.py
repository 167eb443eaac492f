"""The systemd unit of a board's service: restarts, watchdog, sandbox, and limits that leave room for other services.

A CPU board gets a strict sandbox. On a Jetson CUDA needs the GPU's device files and generates code, so the unit allows
these devices and memory that is both writable and executable.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from string import Template

from fedprune.core.errors import ConfigError
from fedprune.core.validation import check_pattern

# The default place of a board's samples.
DEFAULT_SAMPLES_PATH = "/srv/fedprune/samples.npz"

# Folders that the service doesn't see, or sees empty (ProtectHome, PrivateTmp).
HIDDEN_FOLDERS = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108  # nosec B108  # only names

_PATH = re.compile(r"(?!.*/\.\.(/|$))/[A-Za-z0-9_./@+-]{0,200}")
_PLAIN = re.compile(r"[A-Za-z0-9_./:@=,+%$-]+")


def unit_text(arguments: Sequence[str] = ("run",), *, jetson: bool = False, condition: str = "") -> str:
    """The unit that starts `fedprune-device` with these arguments, only if the file `condition` exists.

    Raises `ConfigError` if something would break out of its line.
    """
    if any("\n" in a or "\0" in a for a in arguments):
        raise ConfigError("arguments of a service", expected="one line each")
    if condition:
        check_pattern("file", condition, _PATH, "an absolute path of letters, digits and _./@+-, without ..")
    units = files(__package__) / "units"
    return Template((units / "board.service").read_text(encoding="ascii")).substitute(
        condition=f"ConditionPathExists={condition}\n" if condition else "",
        arguments=" ".join(map(_quote, arguments)),
        sandbox=(units / ("jetson.conf" if jetson else "cpu.conf")).read_text(encoding="ascii"),
    )


def _quote(word: str) -> str:
    """A word of a command line in systemd's quoting (systemd.service(5), "Command lines")."""
    # systemd expands both, also between quotes.
    escaped = word.replace("%", "%%").replace("$", "$$")
    if _PLAIN.fullmatch(escaped):
        return escaped
    return '"' + escaped.replace("\\", "\\\\").replace('"', '\\"') + '"'

"""`fedprune-server health`: whether the server of this container lives, for probes; it loads next to nothing."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from fedprune.core.cli import seconds
from fedprune.core.errors import ExitCode, UsageError

_VARIABLE = "FEDPRUNE_PULSE"


def add_health_command(commands: Any) -> None:
    """Add `health` to the parser of `fedprune-server`."""
    health = commands.add_parser("health", help=f"whether the server lives that has {_VARIABLE} in its environment")
    health.add_argument("--pulse", type=Path, metavar="FILE", help=f"the file that it touches (default: {_VARIABLE})")
    health.add_argument("--within", type=seconds, default=120.0, metavar="S", help="how long ago (default: 120)")
    health.add_argument("--ready", action="store_true", help="it must run, too, not only stand by")
    health.set_defaults(run=_health)


def _health(arguments: argparse.Namespace) -> int:
    from fedprune_server.monitoring.health import check_pulse

    path = arguments.pulse or (Path(os.environ[_VARIABLE]) if os.environ.get(_VARIABLE) else None)
    if path is None:
        raise UsageError("health", expected=f"--pulse FILE, or {_VARIABLE} in the environment", got="neither")
    print(check_pulse(path, arguments.within, running=arguments.ready))
    return int(ExitCode.OK)

"""`fedprune-server health`: whether a server lives, for probes; it is called often, so it imports little."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from fedprune.core.cli import add_json_option, positive_seconds, print_json
from fedprune.core.errors import UsageError
from fedprune_server.monitoring.health import HEALTH_FILE_VARIABLE as _PULSE
from fedprune_server.monitoring.health import check_pulse


def add_health(health: argparse.ArgumentParser) -> None:
    health.add_argument("--pulse", type=Path, metavar="FILE", help=f"file that the server touches (default: ${_PULSE})")
    health.add_argument(
        "--within", type=positive_seconds, default=120.0, metavar="S", help="seconds since then, at most (default: 120)"
    )
    health.add_argument("--ready", action="store_true", help="a server on standby doesn't count")
    add_json_option(health)
    health.set_defaults(function=_health)


def _health(arguments: argparse.Namespace) -> None:
    # A container's probe has the server's environment; a probe from outside names the file.
    path = arguments.pulse or (Path(os.environ[_PULSE]) if os.environ.get(_PULSE) else None)
    if path is None:
        raise UsageError("health", expected=f"--pulse FILE, or {_PULSE} in the environment", got="neither")
    server_name = check_pulse(path, arguments.within, running=arguments.ready)
    if arguments.json:
        print_json({"server": server_name})
    else:
        print(server_name)

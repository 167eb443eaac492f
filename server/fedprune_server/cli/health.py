"""`fedprune-server health`: whether a server lives, for probes; it is called often, so it imports little."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from fedprune.core.cli import add_json_option, print_json
from fedprune.core.errors import UsageError
from fedprune_server.monitoring.health import HEALTH_FILE_VARIABLE as _PULSE
from fedprune_server.monitoring.health import check_pulse


def add_health(health: argparse.ArgumentParser) -> None:
    health.add_argument("--ready", action="store_true", help="a server on standby doesn't count")
    add_json_option(health)
    health.set_defaults(function=_health)


def _health(arguments: argparse.Namespace) -> None:
    if not (name := os.environ.get(_PULSE)):
        raise UsageError("health", expected=f"{_PULSE} in the environment, as the server has it", got="none")
    server_name = check_pulse(Path(name), running=arguments.ready)
    if arguments.json:
        print_json({"server": server_name})
    else:
        print(server_name)

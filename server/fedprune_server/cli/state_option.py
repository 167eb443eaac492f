"""The option `--state` of commands for a state folder."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

VARIABLE = "FEDPRUNE_SERVER_STATE"
_DEFAULT = "fedprune-state"
_TEXT = "the folder of `run --state`"


def add_state(parser: argparse.ArgumentParser, text: str = _TEXT) -> None:
    said = f"{text} (default: {VARIABLE}, or {_DEFAULT})"
    parser.add_argument("--state", type=Path, default=_folder(), metavar="DIR", help=said)


def _folder() -> Path:
    found = {name: os.environ[name] for name in (VARIABLE, f"{VARIABLE}_FILE") if os.environ.get(name, "").strip()}
    if list(found) in ([], [VARIABLE]):
        return Path(found.get(VARIABLE, _DEFAULT))
    from fedprune_server.config.environment import environment_layer  # as rarely as it is needed: it takes a while

    return Path(environment_layer(found).tables["server"]["state"])

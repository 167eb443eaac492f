"""`fedprune-server service print|install`: the systemd unit that keeps a server running."""

from __future__ import annotations

import argparse
import pwd
import shutil
import subprocess  # nosec B404  # lists of words, never a shell
import sys
from pathlib import Path
from typing import Any

from fedprune.core.atomic_file import write_whole
from fedprune.core.disk import storage_errors
from fedprune.core.errors import ConfigError, ExitCode, StorageError, UsageError, reason
from fedprune_server.cli.systemd_unit import ServerUnit, program_of

NAME = "fedprune-server.service"
_UNITS = Path("/etc/systemd/system")
_SYSTEMD = Path("/run/systemd/system")
"""There where systemd is the machine's first process (sd_booted(3))."""


def add_service(service: argparse.ArgumentParser) -> None:
    actions = service.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in (("print", "print the unit"), ("install", "write the unit, and let systemd read it")):
        action = actions.add_parser(name, help=text)
        action.add_argument("--config", default="/etc/fedprune/fleet.toml", metavar="FILE", help="default: %(default)s")
        action.add_argument(
            "--environment", default="/etc/fedprune/server.env", metavar="FILE", help="default: %(default)s"
        )
        action.add_argument("--user", default="fedprune", metavar="NAME", help="who runs it (default: %(default)s)")
        action.add_argument("--state", default="/var/lib/fedprune", metavar="DIR", help="default: %(default)s")
        action.add_argument("--memory", default="90%", metavar="MOST", help="such as 8G (default: 90%%)")
        action.add_argument("--program", metavar="FILE", help="default: the fedprune-server of this environment")
        action.add_argument(
            "--credential", action="append", default=[], metavar="TABLE.KEY=FILE",
            help="a setting that stands in a file of root's, such as server.database=/etc/fedprune/database",
        )  # fmt: skip
        action.add_argument("arguments", nargs="*", metavar="-- OPTION", help="further options of `run`")
        action.set_defaults(function=_service)
    actions.choices["install"].add_argument(
        "--units", type=Path, default=_UNITS, metavar="DIR", help="where units lie (default: %(default)s)"
    )


def _service(arguments: argparse.Namespace) -> int:
    credentials = [tuple(text.partition("=")[::2]) for text in arguments.credential]
    unit = ServerUnit(
        arguments.program or str(program_of(Path(sys.argv[0]), Path(sys.prefix))),
        arguments.config,
        arguments.environment,
        arguments.user,
        arguments.state,
        tuple(arguments.arguments),
        tuple((str(a), str(b)) for a, b in credentials),
        arguments.memory,
    )
    if arguments.action == "print":
        print(unit.text(), end="")
    else:
        _install(unit, arguments.units)
    return int(ExitCode.OK)


def _install(unit: Any, folder: Path) -> None:
    try:
        pwd.getpwnam(unit.user)
    except KeyError:
        raise ConfigError(
            "--user", expected="a user of this machine", got=unit.user,
            hint=f"Make one: useradd --system --home-dir {unit.state} --shell /usr/sbin/nologin {unit.user}",
        ) from None  # fmt: skip
    for path in (unit.program, unit.config, *(p for _, p in unit.credentials)):
        if not Path(path).is_file():
            raise UsageError(path, expected="a file that exists", got="none")
    if not folder.is_dir():
        raise StorageError(f"there is no folder {folder}", hint="Name that of systemd's units with --units.")
    path = folder / NAME
    with storage_errors(f"can't write {path}"):
        write_whole(path, unit.text().encode())
        path.chmod(0o644)
    print(f"{path} is written")
    systemctl = shutil.which("systemctl")
    if folder == _UNITS and _SYSTEMD.is_dir() and systemctl is not None:
        done = subprocess.run([systemctl, "daemon-reload"], capture_output=True, text=True, check=False)  # noqa: S603  # nosec B603  # systemctl daemon-reload
        if done.returncode:
            raise StorageError(f"systemctl daemon-reload: {reason(RuntimeError(done.stderr))}")
    print(f"start it, now and with the machine: systemctl enable --now {NAME.removesuffix('.service')}")

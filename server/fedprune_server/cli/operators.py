"""`fedprune-server operators`: the accounts of the console."""

from __future__ import annotations

import argparse
import getpass
import json
import os
import sys
from datetime import datetime, timezone
from pathlib import Path

from fedprune.core.cli import add_json
from fedprune.core.errors import StorageError, UsageError
from fedprune_server.cli.state_option import add_state
from fedprune_server.web.auth.accounts import Accounts
from fedprune_server.web.auth.roles import ROLES


def add_operators(operators: argparse.ArgumentParser) -> None:
    actions = operators.add_subparsers(dest="action", required=True, metavar="ACTION")
    add = actions.add_parser("add", help="a new one; asks for the password, or reads it from standard input")
    add.add_argument("name", metavar="NAME", help="what they log in as")
    add.add_argument(
        "--role", choices=ROLES, default=ROLES[0], help="what they may do (default: viewer, which is to look)"
    )
    password = actions.add_parser("password", help="another password; their sessions end")
    password.add_argument("name", metavar="NAME", help="who")
    remove = actions.add_parser("remove", help="take an account away; its sessions end")
    remove.add_argument("name", metavar="NAME", help="who")
    shown = actions.add_parser("list", help="list them")
    add_json(shown)
    for action, run in ((add, _add), (password, _password), (remove, _remove), (shown, _list)):
        add_state(action)
        action.set_defaults(function=run)


def _add(arguments: argparse.Namespace) -> None:
    opened = _Opened(arguments.state)
    with opened as accounts:
        accounts.check_new(arguments.name, arguments.role)
        accounts.add(arguments.name, arguments.role, _read_password())
        opened.note("operator_add", operator=arguments.name, role=arguments.role)
    print(f"{arguments.name} may use the console as {arguments.role}")


def _password(arguments: argparse.Namespace) -> None:
    opened = _Opened(arguments.state)
    with opened as accounts:
        accounts.check_known(arguments.name)
        accounts.set_password(arguments.name, _read_password())
        opened.note("operator_password", operator=arguments.name)
    print(f"{arguments.name} has another password, and is logged out everywhere")


def _remove(arguments: argparse.Namespace) -> None:
    opened = _Opened(arguments.state)
    with opened as accounts:
        accounts.remove(arguments.name)
        opened.note("operator_remove", operator=arguments.name)
    print(f"{arguments.name} may not use the console any more")


def _list(arguments: argparse.Namespace) -> None:
    with _Opened(arguments.state) as accounts:
        found = accounts.list()
    if arguments.json:
        rows = [{"name": o.name, "role": o.role, "made": o.made_at, "changed": o.changed_at} for o in found]
        print(json.dumps(rows, indent=2))
        return
    for operator in found:
        made = datetime.fromtimestamp(operator.made_at, timezone.utc)
        print(f"{operator.name:<24} {operator.role:<9} since {made:%Y-%m-%d}")
    if not found:
        print("the console has no accounts yet: fedprune-server operators add NAME --role admin")


class _Opened:
    """The accounts of a state folder, while this is entered."""

    def __init__(self, state: Path) -> None:
        from fedprune_device.storage.directory_owner import check_unowned
        from fedprune_server.web.database import FILE, ConsoleDatabase

        if not state.is_dir():
            raise StorageError(
                f"{state} is no state folder", hint="Name the one of `run --state`, or make it first: init, or run."
            )
        check_unowned(state)
        self._user = _user()
        self._database = ConsoleDatabase(state / FILE)

    def __enter__(self) -> Accounts:
        from fedprune_server.web.auth.accounts import Accounts

        return Accounts(self._database)

    def note(self, action: str, **what: str) -> None:
        from fedprune_server.web.audit import Audit

        Audit(self._database).note(self._user, "terminal", action, what, "done")

    def __exit__(self, *_: object) -> None:
        self._database.close()


def _user() -> str:
    """Name of the process's user; its number where the system lists no name, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on
        return f"uid {os.getuid()}"


def _read_password() -> str:
    """A password: asked for twice, unseen, at a terminal; else the first line of standard input."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        if not line:
            raise UsageError("password", expected="a line on standard input", got="nothing")
        return line.rstrip("\r\n")
    print(end="", file=sys.stderr)  # ends the spinner: the prompt is written past this process's streams
    first = getpass.getpass("password: ")
    if getpass.getpass("again: ") != first:
        raise UsageError("the passwords differ", hint="Try again.")
    return first

"""`fedprune-server operators`, `pause` and `resume`: the console's accounts, and its orders about a job."""

from __future__ import annotations

import argparse
import getpass
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fedprune.core.cli import print_json
from fedprune.core.disk import has_lock_holder
from fedprune.core.errors import ConfigError, StorageError, UsageError
from fedprune.wire.topics import to_name
from fedprune_device.storage.directory_owner import check_unowned
from fedprune_server.storage.folder_lock import LOCK_FILE
from fedprune_server.storage.storage import Storage
from fedprune_server.web.audit import Audit
from fedprune_server.web.auth.accounts import Accounts, Operator
from fedprune_server.web.auth.sessions import OperatorSession
from fedprune_server.web.database import CONSOLE_FILE, ConsoleDatabase
from fedprune_server.web.state.fleet_view import FleetView
from fedprune_server.web.state.order_queue import WITHDRAWN
from fedprune_server.web.state.orders import OrderService, RefusedError
from fedprune_server.web.state.status_writer import STATUS_FILE

# The loop looks for orders twice a second; if one isn't answered in 30 s, the server hangs.
_ANSWER_TIMEOUT_S, _POLL_INTERVAL_S = 30.0, 0.2
_TAKEN_HINT = "It may still carry it out. See its log."


def run_order(arguments: argparse.Namespace) -> None:
    """Give a running server the order of the command's name, as its console does, and print the answer."""
    path = arguments.state / STATUS_FILE
    if not has_lock_holder(arguments.state / LOCK_FILE):
        Storage.check_existing(arguments.state)
        hint = "A job that is not running asks no board for anything."
        raise ConfigError(f"no server runs on {arguments.state}", hint=hint)
    with FleetView(path) if path.exists() else nullcontext() as view:
        if view is None or not view.is_ready:
            hint = "Start it with its console (--console 8470): it takes orders where that does (docs/console.md)."
            raise ConfigError(f"no server that takes orders runs on {arguments.state}", hint=hint)
        with _open_database(arguments.state) as database:
            orders = OrderService(view, Audit(database), database)
            # No login: the file system has authorised the users who can write to the state folder.
            session = OperatorSession(Operator(to_name(_user_name()), "operator", 0.0, 0.0), "", "")
            try:
                job = arguments.job or view.job_names[0]
                # A terminal that is killed withdraws nothing: its order expires.
                number = orders.give(session, "terminal", {"order": arguments.command, "job": job}, _ANSWER_TIMEOUT_S)
            except RefusedError as error:
                raise ConfigError(error.text) from error
            answer = wait_for_answer(orders, number)
    if answer is not None and answer["state"] != "done":
        raise ConfigError(
            f"the server has taken the order, and has not answered it within {_ANSWER_TIMEOUT_S:.0f} s",
            hint=_TAKEN_HINT,
        )
    text = "no answer" if answer is None else answer["text"]
    if answer is None or not answer["ok"]:
        hint = f"The server had {_ANSWER_TIMEOUT_S:.0f} s to take it. See its log." if text == WITHDRAWN else ""
        raise ConfigError(f"{arguments.command}: {text}", hint=hint)
    print(text)


def wait_for_answer(
    orders: OrderService,
    number: int,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any] | None:
    """Wait for the answer to an order.

    The order is withdrawn if the server doesn't take it in time, or the user interrupts. Returns it as it is then.
    """
    deadline = now() + _ANSWER_TIMEOUT_S
    try:
        while (answer := orders.get(number)) is not None and answer["state"] != "done" and now() < deadline:
            sleep(_POLL_INTERVAL_S)
    except KeyboardInterrupt as error:
        try:
            answer = _withdraw(orders, number)
            text = "" if answer is None else answer["text"] or f"the server has taken the order. {_TAKEN_HINT}"
        except StorageError as storage:
            text = f"the server may still take the order within {_ANSWER_TIMEOUT_S:.0f} s ({storage})"
        raise KeyboardInterrupt(text) from error
    return _withdraw(orders, number)


def _withdraw(orders: OrderService, number: int) -> dict[str, Any] | None:
    """Withdraw an order unless the server has taken or answered it, and return it."""
    if (order := orders.get(number)) is not None and order["state"] != "done":
        orders.withdraw(number)
        order = orders.get(number)
    return order


def run_add(arguments: argparse.Namespace) -> None:
    with _open_database(arguments.state) as database:
        accounts = Accounts(database)
        # Before the password is asked for: nobody wants to type one twice for a name that is taken.
        accounts.check_new(arguments.name, arguments.role)
        accounts.add(arguments.name, arguments.role, _read_password())
        _note(database, "operator_add", operator=arguments.name, role=arguments.role)
    print(f"{arguments.name} may use the console as {arguments.role}")


def run_password(arguments: argparse.Namespace) -> None:
    with _open_database(arguments.state) as database:
        accounts = Accounts(database)
        accounts.check_exists(arguments.name)
        accounts.set_password(arguments.name, _read_password())
        _note(database, "operator_password", operator=arguments.name)
    print(f"{arguments.name} has another password, and is logged out everywhere")


def run_remove(arguments: argparse.Namespace) -> None:
    with _open_database(arguments.state) as database:
        Accounts(database).remove(arguments.name)
        _note(database, "operator_remove", operator=arguments.name)
    print(f"{arguments.name} may not use the console any more")


def run_list(arguments: argparse.Namespace) -> None:
    with _open_database(arguments.state) as database:
        operators = Accounts(database).list()
    if arguments.json:
        print_json([{"name": o.name, "role": o.role, "made": o.made_at, "changed": o.changed_at} for o in operators])
        return
    for operator in operators:
        made_at = datetime.fromtimestamp(operator.made_at, timezone.utc)
        print(f"{operator.name:<24} {operator.role:<9} since {made_at:%Y-%m-%d}")
    if not operators:
        print("the console has no accounts yet: fedprune-server operators add NAME --role admin")


def _open_database(state: Path) -> ConsoleDatabase:
    if not state.is_dir():
        hint = "Name the folder of `run --state`, or make it first: init, or run."
        raise StorageError(f"{state} is no state folder", hint=hint)
    check_unowned(state)
    return ConsoleDatabase(state / CONSOLE_FILE)


def _note(database: ConsoleDatabase, action: str, **details: str) -> None:
    """Note a change of the accounts in the audit log."""
    Audit(database).note(_user_name(), "terminal", action, details, "done")


def _user_name() -> str:
    """Name of the process's user; its number where the system lists no name, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on
        return f"uid {os.getuid()}"


def _read_password() -> str:
    """A password: asked for twice, unseen, at a terminal; otherwise the first line of standard input."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        if not line:
            raise UsageError("password", expected="a line on standard input", got="nothing")
        return line.rstrip("\r\n")
    first = getpass.getpass("password: ")
    if getpass.getpass("again: ") != first:
        raise UsageError("the passwords differ", hint="Try again.")
    return first

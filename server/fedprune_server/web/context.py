"""Puts together the parts of a console that its routes use."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from argon2 import PasswordHasher
from starlette.requests import Request

from fedprune_server.web.audit import Audit
from fedprune_server.web.auth.accounts import Accounts
from fedprune_server.web.auth.middleware import Exposure
from fedprune_server.web.auth.sessions import OperatorSession, OperatorSessions
from fedprune_server.web.auth.throttle import Throttle
from fedprune_server.web.database import ConsoleDatabase
from fedprune_server.web.events import Streams
from fedprune_server.web.state.fleet_view import FleetView
from fedprune_server.web.state.orders import OrderService


@dataclass
class Console:
    view: FleetView
    accounts: Accounts
    sessions: OperatorSessions
    throttle: Throttle
    audit: Audit
    orders: OrderService
    streams: Streams
    exposure: Exposure = field(default_factory=Exposure)


def make_console(
    view: FleetView,
    database: ConsoleDatabase,
    exposure: Exposure | None = None,
    hasher: PasswordHasher | None = None,
    clock: Callable[[], float] = time.time,
) -> Console:
    """Make a console. Without a `hasher` passwords are hashed with argon2id's slow defaults; tests give a fast one."""
    accounts, audit = Accounts(database, hasher, clock), Audit(database, clock)
    return Console(
        view,
        accounts,
        OperatorSessions(database, accounts, clock),
        Throttle(database, clock),
        audit,
        OrderService(view, audit, database, clock),
        Streams(),
        exposure or Exposure(),
    )


def session_of(request: Request) -> OperatorSession:
    session: OperatorSession = request.state.session
    return session

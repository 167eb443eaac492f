"""All that the routes of a console need."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from argon2 import PasswordHasher
from starlette.requests import Request

from fedprune_server.web.audit import Audit
from fedprune_server.web.auth.accounts import Accounts
from fedprune_server.web.auth.middleware import Surroundings
from fedprune_server.web.auth.sessions import Session, Sessions
from fedprune_server.web.auth.throttle import Throttle
from fedprune_server.web.database import ConsoleDatabase
from fedprune_server.web.events import Streams
from fedprune_server.web.state.orders import OrderService
from fedprune_server.web.state.status import FleetView


@dataclass
class Console:
    """A console, apart from its routes.

    Attributes:
        view: What the server has published.
        accounts: The operators.
        sessions: Who is logged in.
        throttle: Slows logins that fail.
        audit: Who did what.
        orders: Operators' orders.
        streams: Live events for browsers.
        around: How browsers reach it.
    """

    view: FleetView
    accounts: Accounts
    sessions: Sessions
    throttle: Throttle
    audit: Audit
    orders: OrderService
    streams: Streams
    around: Surroundings = field(default_factory=Surroundings)


def make_console(
    view: FleetView,
    database: ConsoleDatabase,
    around: Surroundings | None = None,
    hasher: PasswordHasher | None = None,
    clock: Callable[[], float] = time.time,
) -> Console:
    """A console.

    Args:
        view: What the server has published.
        database: Operators, sessions, orders and audit log.
        around: How browsers reach it.
        hasher: Of passwords; None for a slow one.
        clock: Seconds since 1970.
    """
    accounts, audit = Accounts(database, hasher, clock), Audit(database, clock)
    return Console(
        view,
        accounts,
        Sessions(database, accounts, clock),
        Throttle(database, clock),
        audit,
        OrderService(view, audit, database, clock),
        Streams(),
        around or Surroundings(),
    )


def session_of(request: Request) -> Session:
    """The session of an authenticated request."""
    session: Session = request.state.session
    return session

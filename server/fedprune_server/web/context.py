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
from fedprune_server.web.state.model import Model
from fedprune_server.web.state.order_messages import Order
from fedprune_server.web.state.orders import OrderDesk


@dataclass
class Console:
    """A console, apart from its routes.

    Attributes:
        model: What the server has told.
        accounts: The operators.
        sessions: Who is logged in.
        throttle: Slows logins that fail.
        audit: Who did what.
        orders: Passes orders on.
        streams: Live news.
        around: How browsers reach it.
    """

    model: Model
    accounts: Accounts
    sessions: Sessions
    throttle: Throttle
    audit: Audit
    orders: OrderDesk
    streams: Streams
    around: Surroundings = field(default_factory=Surroundings)


def make_console(
    model: Model,
    database: ConsoleDatabase,
    send: Callable[[Order], None],
    around: Surroundings | None = None,
    hasher: PasswordHasher | None = None,
    clock: Callable[[], float] = time.time,
) -> Console:
    """A console.

    Args:
        model: What the server has told.
        database: Operators, sessions and audit log.
        send: Passes an order on to the server.
        around: How browsers reach it.
        hasher: Of passwords; None for a slow one.
        clock: Seconds since 1970.
    """
    accounts, audit = Accounts(database, hasher, clock), Audit(database, clock)
    return Console(
        model,
        accounts,
        Sessions(database, accounts, clock),
        Throttle(database, clock),
        audit,
        OrderDesk(model, audit, send, clock),
        Streams(model),
        around or Surroundings(),
    )


def session_of(request: Request) -> Session:
    """The session of a request that got through the gate to a path that needs one."""
    session: Session = request.state.session
    return session

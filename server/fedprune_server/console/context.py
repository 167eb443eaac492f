"""All that the routes of a console need."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from argon2 import PasswordHasher
from starlette.requests import Request

from fedprune_server.console.accounts import Accounts
from fedprune_server.console.audit import Audit
from fedprune_server.console.database import ConsoleDatabase
from fedprune_server.console.gate import Surroundings
from fedprune_server.console.model import Model
from fedprune_server.console.order_desk import OrderDesk
from fedprune_server.console.order_words import Order
from fedprune_server.console.sessions import Session, Sessions
from fedprune_server.console.streams import Streams
from fedprune_server.console.throttle import Throttle


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

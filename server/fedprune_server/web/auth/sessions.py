"""Sessions: who is logged in. A browser holds a random token; the database holds only the token's digest."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from fedprune_server.web.auth.accounts import Accounts, Operator
from fedprune_server.web.database import ConsoleDatabase

# An unused session ends after this time: a working day.
IDLE_LIMIT_S = 8 * 3600.0

# Every session ends after this time, so that a stolen token is of no use for longer.
MAX_SESSION_S = 24 * 3600.0

# Sessions that an operator may have; a further one ends the one that was used longest ago.
MAX_SESSIONS = 20

# The time of a session's last use is written once a minute: an open page makes a request every few seconds.
_USE_INTERVAL_S = 60.0


@dataclass(frozen=True)
class OperatorSession:
    """A logged-in operator with the role of now, the token `csrf` that orders repeat, and the session's digest."""

    operator: Operator
    csrf: str
    id: str


class OperatorSessions:
    """The sessions of all operators, in the console's database."""

    def __init__(self, database: ConsoleDatabase, accounts: Accounts, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._accounts = accounts
        self._clock = clock
        self._secret = secrets.token_bytes(32)

    def begin(self, operator: Operator, address: str) -> str:
        """Begin a session of an authenticated operator; returns its token, which is stored nowhere."""
        token, now = secrets.token_urlsafe(32), self._clock()
        with self._database.transaction():
            self._database.execute(
                "DELETE FROM sessions WHERE made_at < ? OR seen_at < ?", now - MAX_SESSION_S, now - IDLE_LIMIT_S
            )
            self._database.execute(
                "DELETE FROM sessions WHERE token IN "
                "(SELECT token FROM sessions WHERE operator = ? ORDER BY seen_at DESC LIMIT -1 OFFSET ?)",
                operator.name, MAX_SESSIONS - 1,
            )  # fmt: skip
            self._database.execute(
                "INSERT INTO sessions (token, operator, csrf, address, made_at, seen_at) VALUES (?, ?, ?, ?, ?, ?)",
                _digest(token), operator.name, secrets.token_urlsafe(32), address, now, now,
            )  # fmt: skip
        return token

    def find(self, token: str | None, *, used: bool = True) -> OperatorSession | None:
        """The session of a token; None if it doesn't exist or has ended. `used` keeps it from ending as idle."""
        if not token or len(token) > 100:
            return None
        row = self._database.row("SELECT * FROM sessions WHERE token = ?", _digest(token))
        now = self._clock()
        if row is None or now - row["made_at"] > MAX_SESSION_S or now - row["seen_at"] > IDLE_LIMIT_S:
            return None
        operator = self._accounts.get(row["operator"])
        if operator is None:
            return None
        if used and now - row["seen_at"] > _USE_INTERVAL_S:
            # A request doesn't wait for another process that writes: the next request sets the time.
            self._database.try_execute(("UPDATE sessions SET seen_at = ? WHERE token = ?", (now, row["token"])))
        return OperatorSession(operator, row["csrf"], row["token"])

    def end(self, token: str | None) -> None:
        if token:
            self._database.execute("DELETE FROM sessions WHERE token = ?", _digest(token))

    def login_token(self, nonce: str) -> str:
        """The token that a login form must repeat, for a browser with this nonce."""
        return hmac.new(self._secret, nonce.encode(), "sha256").hexdigest()


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()

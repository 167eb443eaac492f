"""Accounts of operators: who may use the console, and in which role. Passwords are kept as argon2id hashes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from fedprune.core.errors import ConfigError, StorageError
from fedprune.wire.topics import check_topic_name
from fedprune_server.web.auth.roles import ROLES
from fedprune_server.web.database import ConsoleDatabase

# The longest is far beyond a sentence; hashing a longer one would only cost time.
MIN_PASSWORD, MAX_PASSWORD = 12, 1024


@dataclass(frozen=True)
class Operator:
    """An operator's account; its times are in seconds since 1970."""

    name: str
    role: str
    made_at: float
    changed_at: float


class Accounts:
    """The operators' accounts, with passwords as argon2id hashes, by default as RFC 9106 recommends for little memory.

    Every method raises `StorageError` if the disk fails or is full.
    """

    def __init__(
        self, database: ConsoleDatabase, hasher: PasswordHasher | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._hasher = hasher or PasswordHasher()
        self._clock = clock
        # Compared with for unknown names, so that their refusal takes as long as a wrong password's.
        self._unmatched_hash = self._hasher.hash("nobody's password")

    def __len__(self) -> int:
        row = self._database.row("SELECT count(*) AS n FROM operators")
        return int(row["n"]) if row else 0

    def list(self) -> list[Operator]:
        return [_read_operator(r) for r in self._database.rows("SELECT * FROM operators ORDER BY name")]

    def get(self, name: str) -> Operator | None:
        row = self._database.row("SELECT * FROM operators WHERE name = ?", name)
        return None if row is None else _read_operator(row)

    def add(self, name: str, role: str, password: str) -> Operator:
        """Add an account. Raises `ConfigError` if name, role or password are invalid, or the name is taken."""
        self.check_new(name, role)
        check_password(name, password)
        hashed, now = self._hasher.hash(password), self._clock()
        row_count = self._database.execute(
            "INSERT OR IGNORE INTO operators (name, role, hash, made_at, changed_at) VALUES (?, ?, ?, ?, ?)",
            name, role, hashed, now, now,
        )  # fmt: skip
        if not row_count:
            raise _taken_error(name)
        return Operator(name, role, now, now)

    def check_new(self, name: str, role: str) -> None:
        """Check that an account of this name and role could be added. Raises `ConfigError` if it couldn't."""
        check_topic_name(name, "operator", error=ConfigError)
        if role not in ROLES:
            raise ConfigError("role of an operator", expected=", ".join(ROLES), got=role)
        if self.get(name) is not None:
            raise _taken_error(name)

    def check_exists(self, name: str) -> None:
        """Check that an account exists. Raises `ConfigError` if it doesn't."""
        if self.get(name) is None:
            raise _unknown_error(name)

    def remove(self, name: str) -> None:
        """Delete an account, and end its sessions. Raises `ConfigError` if it doesn't exist."""
        with self._database.transaction():
            row_count = self._database.execute("DELETE FROM operators WHERE name = ?", name)
            self._database.execute("DELETE FROM sessions WHERE operator = ?", name)
        if not row_count:
            raise _unknown_error(name)

    def set_password(self, name: str, password: str) -> None:
        """Change an account's password, and end its sessions. Raises `ConfigError` if account or password are wrong."""
        check_password(name, password)
        hashed = self._hasher.hash(password)
        with self._database.transaction():
            row_count = self._database.execute(
                "UPDATE operators SET hash = ?, changed_at = ? WHERE name = ?", hashed, self._clock(), name
            )
            self._database.execute("DELETE FROM sessions WHERE operator = ?", name)
        if not row_count:
            raise _unknown_error(name)

    def hash_of(self, name: str) -> str:
        """The hash of an operator's password; for an unknown name a hash that no password fits."""
        row = self._database.row("SELECT hash FROM operators WHERE name = ?", name)
        return self._unmatched_hash if row is None else str(row["hash"])

    def is_password(self, hashed: str, password: str) -> bool:
        """Whether a password has this hash: slow on purpose, and safe in any thread."""
        try:
            return self._hasher.verify(hashed, password[: MAX_PASSWORD + 1]) and hashed != self._unmatched_hash
        except (VerificationError, InvalidHashError):
            return False


def check_password(name: str, password: str) -> None:
    """Raise `ConfigError` if a password is too short, too long, the operator's name, or of a few characters."""
    if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
        raise ConfigError("password", expected=f"{MIN_PASSWORD} to {MAX_PASSWORD} characters", got=f"{len(password)}")
    if password.casefold() in (name.casefold(), name.casefold() * 2) or len(set(password)) < 4:
        hint = "Several random words make a good one."
        raise ConfigError("password", expected="one that is hard to guess", hint=hint)


def _read_operator(row: dict[str, Any]) -> Operator:
    if row["role"] not in ROLES:
        raise StorageError(f"operator {row['name']} has a role that is none", got=row["role"])
    return Operator(row["name"], row["role"], row["made_at"], row["changed_at"])


def _taken_error(name: str) -> ConfigError:
    return ConfigError(f"there is an operator {name} already", hint="`operators password` changes a password.")


def _unknown_error(name: str) -> ConfigError:
    return ConfigError(f"no operator is called {name!r}", hint="See `fedprune-server operators list`.")

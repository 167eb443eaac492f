"""Delays logins after failures: briefly for an account, longer for an address, longest for both together.

No stranger can lock an operator out by failing in their name: from elsewhere an account waits a minute at most, and
where its operator has logged in before, others' failures don't count.
"""

from __future__ import annotations

import ipaddress
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from fedprune_server.web.database import ConsoleDatabase

# Accounts and addresses whose failures are kept, the latest ones: strangers can make up any number of names.
MAX_FAILURE_KEYS = 10_000

FAILURE_LIFETIME_S = 3600.0

# How long a running console remembers from where an operator has logged in.
LOGIN_LIFETIME_S = 30 * 86_400.0


@dataclass
class _Failures:
    count: int
    last_at: float
    previous_at: float


@dataclass(frozen=True)
class LoginLimit:
    """How failures delay logins: after `free_failures` ones each doubles the wait, from a second up to `max_wait_s`."""

    free_failures: int
    max_wait_s: float


# An operator may mistype four times without a wait. Several people may share an address, and anybody may fail in an
# operator's name, so that these begin later; an account waits a minute at most, since strangers could lock it.
PAIR, ADDRESS, ACCOUNT = LoginLimit(4, 900.0), LoginLimit(20, 900.0), LoginLimit(30, 60.0)


class Throttle:
    """Counts failed logins, over restarts of the console. Threads may share it."""

    def __init__(self, database: ConsoleDatabase, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock
        self._failures: OrderedDict[tuple[str, ...], _Failures] = OrderedDict()
        self._login_times: OrderedDict[tuple[str, ...], float] = OrderedDict()
        self._lock = threading.RLock()
        for row in database.rows("SELECT * FROM throttle ORDER BY at"):
            self._failures[tuple(json.loads(row["key"]))] = _Failures(row["count"], row["at"], row["before"])

    def wait_s(self, account: str, address: str) -> float:
        """Seconds until a login from this address to this account is allowed; 0 for now."""
        now = self._clock()
        pair, *other_keys = self._keys(account, address)
        if now - self._login_times.get(pair[0], -LOGIN_LIFETIME_S) < LOGIN_LIFETIME_S:
            other_keys = other_keys[:1]  # the address only: strangers can't hold back an operator who is known there
        return max(self._key_wait_s(key, limit, now) for key, limit in (pair, *other_keys))

    def admit(self, account: str, address: str) -> float:
        """Admit a login attempt, or return the seconds until one is allowed; 0 if it is admitted.

        An admitted attempt counts as failed until `reset`, so that many at once can't get round the limits.
        """
        with self._lock:
            wait = self.wait_s(account, address)
            if wait == 0:
                self.count_failure(account, address)
            return wait

    def count_failure(self, account: str, address: str) -> None:
        """Count a login as failed."""
        with self._lock:
            now = self._clock()
            for key, _ in self._keys(account, address):
                failures = self._failures.pop(key, None)
                if failures is None or now - failures.last_at > FAILURE_LIFETIME_S:
                    failures = _Failures(0, now, now)
                failures.count, failures.last_at, failures.previous_at = failures.count + 1, now, failures.last_at
                self._failures[key] = failures
            while len(self._failures) > MAX_FAILURE_KEYS:
                self._failures.popitem(last=False)
            self._store_changes(account, address)

    def reset(self, account: str, address: str) -> None:
        """Reset the account from this address after a login.

        Failures of the address in other names still count: an attacker may have an account, too.
        """
        with self._lock:
            pair_key, *other_keys = (key for key, _ in self._keys(account, address))
            self._failures.pop(pair_key, None)
            for key in other_keys:
                if (failures := self._failures.get(key)) is not None:
                    failures.count, failures.last_at = failures.count - 1, failures.previous_at
            self._login_times.pop(pair_key, None)
            self._login_times[pair_key] = self._clock()
            while len(self._login_times) > MAX_FAILURE_KEYS:
                self._login_times.popitem(last=False)
            self._store_changes(account, address)

    def _store_changes(self, account: str, address: str) -> None:
        """Store the changes; if another process is writing, the next login stores them."""
        changes: list[tuple[str, tuple[object, ...]]] = []
        for key, _ in self._keys(account, address):
            name, failures = json.dumps(key), self._failures.get(key)
            if failures is None:
                changes.append(("DELETE FROM throttle WHERE key = ?", (name,)))
            else:
                values = name, failures.count, failures.last_at, failures.previous_at
                changes.append(("INSERT OR REPLACE INTO throttle VALUES (?, ?, ?, ?)", values))
        changes.append(("DELETE FROM throttle WHERE at < ?", (self._clock() - FAILURE_LIFETIME_S,)))
        self._database.try_execute(*changes)

    def _key_wait_s(self, key: tuple[str, ...], limit: LoginLimit, now: float) -> float:
        failures = self._failures.get(key)
        if failures is None or failures.count < limit.free_failures or now - failures.last_at > FAILURE_LIFETIME_S:
            return 0.0
        seconds = min(limit.max_wait_s, 2.0 ** min(failures.count - limit.free_failures, 16))
        return min(seconds, max(0.0, failures.last_at + seconds - now))

    @staticmethod
    def _keys(account: str, address: str) -> list[tuple[tuple[str, ...], LoginLimit]]:
        net = network(address)
        return [(("both", account, net), PAIR), (("address", net), ADDRESS), (("account", account), ACCOUNT)]


def network(address: str) -> str:
    """The network that stands for an address in counts: with IPv6 the /64, because a client can use all of it."""
    try:
        ip_address = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address[:64]
    if isinstance(ip_address, ipaddress.IPv6Address) and ip_address.ipv4_mapped is None:
        return str(ipaddress.ip_network((ip_address, 64), strict=False))
    return str(getattr(ip_address, "ipv4_mapped", None) or ip_address)

"""Delays after failed logins: short for an account, longer for an address, longest for both together.

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

MOST_KEPT = 10_000
"""Accounts and addresses that are remembered; beyond that the ones that failed longest ago are forgotten."""

FORGOTTEN_S = 3600.0

KNOWN_S = 30 * 86_400.0
"""How long a running console remembers an operator's address."""


@dataclass
class _Failures:
    count: int
    at: float
    before: float


@dataclass(frozen=True)
class Limit:
    """How failures delay logins: after `free` ones each doubles the wait, from a second up to `longest_s`."""

    free: int
    longest_s: float


PAIR, ADDRESS, ACCOUNT = Limit(4, 900.0), Limit(20, 900.0), Limit(30, 60.0)


class Throttle:
    """Counts failed logins, over restarts of the console. Threads may share it."""

    def __init__(self, database: ConsoleDatabase, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock
        self._failures: OrderedDict[tuple[str, ...], _Failures] = OrderedDict()
        self._known: OrderedDict[tuple[str, ...], float] = OrderedDict()
        self._lock = threading.RLock()
        for row in database.rows("SELECT * FROM throttle ORDER BY at"):
            self._failures[tuple(json.loads(row["key"]))] = _Failures(row["count"], row["at"], row["before"])

    def wait_s(self, account: str, address: str) -> float:
        """Seconds until a login from this address to this account is allowed; 0 for now."""
        now = self._clock()
        both, *others = self._keys(account, address)
        if now - self._known.get(both[0], -KNOWN_S) < KNOWN_S:
            others = others[:1]
        return max(self._wait(key, limit, now) for key, limit in (both, *others))

    def enter(self, account: str, address: str) -> float:
        """Let a login be tried, which counts as failed until `succeeded` takes that back, so that many at once are no
        way round the limits; returns the seconds until that is allowed, 0 if it may be tried now."""
        with self._lock:
            wait = self.wait_s(account, address)
            if wait == 0:
                self.failed(account, address)
            return wait

    def failed(self, account: str, address: str) -> None:
        """Count a login as failed."""
        with self._lock:
            now = self._clock()
            for key, _ in self._keys(account, address):
                known = self._failures.pop(key, None)
                if known is None or now - known.at > FORGOTTEN_S:
                    known = _Failures(0, now, now)
                known.count, known.at, known.before = known.count + 1, now, known.at
                self._failures[key] = known
            while len(self._failures) > MOST_KEPT:
                self._failures.popitem(last=False)
            self._keep(account, address)

    def succeeded(self, account: str, address: str) -> None:
        """Reset the account from this address after a login.

        What failed for the address in other names still counts: an attacker may have an account, too.
        """
        with self._lock:
            both, *others = (key for key, _ in self._keys(account, address))
            self._failures.pop(both, None)
            for key in others:
                if (known := self._failures.get(key)) is not None:
                    known.count, known.at = known.count - 1, known.before
            self._known.pop(both, None)
            self._known[both] = self._clock()
            while len(self._known) > MOST_KEPT:
                self._known.popitem(last=False)
            self._keep(account, address)

    def _keep(self, account: str, address: str) -> None:
        """Store the changes; while another process writes, the next login does."""
        changes: list[tuple[str, tuple[object, ...]]] = []
        for key, _ in self._keys(account, address):
            name, known = json.dumps(key), self._failures.get(key)
            if known is None:
                changes.append(("DELETE FROM throttle WHERE key = ?", (name,)))
            else:
                values = name, known.count, known.at, known.before
                changes.append(("INSERT OR REPLACE INTO throttle VALUES (?, ?, ?, ?)", values))
        changes.append(("DELETE FROM throttle WHERE at < ?", (self._clock() - FORGOTTEN_S,)))
        self._database.try_to(*changes)

    def _wait(self, key: tuple[str, ...], limit: Limit, now: float) -> float:
        known = self._failures.get(key)
        if known is None or known.count < limit.free or now - known.at > FORGOTTEN_S:
            return 0.0
        seconds = min(limit.longest_s, 2.0 ** min(known.count - limit.free, 16))
        return min(seconds, max(0.0, known.at + seconds - now))

    @staticmethod
    def _keys(account: str, address: str) -> list[tuple[tuple[str, ...], Limit]]:
        net = network(address)
        return [(("both", account, net), PAIR), (("address", net), ADDRESS), (("account", account), ACCOUNT)]


def network(address: str) -> str:
    """The network that is counted for an address: with IPv6 the /64, all of which a client can use."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address[:64]
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is None:
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(getattr(found, "ipv4_mapped", None) or found)

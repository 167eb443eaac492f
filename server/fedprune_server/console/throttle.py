"""Logins are slowed where they fail: a little for an account, more for an address, most for both together.

Nobody can lock an operator out by failing in their name: from elsewhere an account waits a minute at most, and where
its operator has logged in before it doesn't wait for others' failures.
"""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

MOST_KEPT = 10_000
"""Accounts and addresses that are remembered; beyond that the ones that failed longest ago are forgotten."""

FORGOTTEN_S = 3600.0

KNOWN_S = 30 * 86_400.0
"""So long it is remembered from where somebody has logged in, while the console runs."""


@dataclass
class _Failures:
    count: int
    at: float
    before: float


@dataclass(frozen=True)
class Limit:
    """How failures slow what comes next.

    Attributes:
        free: Failures that cost nothing.
        longest_s: The longest wait; each failure beyond the free ones doubles it, from a second on.
    """

    free: int
    longest_s: float


PAIR, ADDRESS, ACCOUNT = Limit(4, 900.0), Limit(20, 900.0), Limit(30, 60.0)


class Throttle:
    """Remembers failed logins.

    Args:
        clock: Seconds of a clock that nobody sets.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: OrderedDict[tuple[str, ...], _Failures] = OrderedDict()
        self._known: OrderedDict[tuple[str, ...], float] = OrderedDict()

    def wait_s(self, account: str, address: str) -> float:
        """How long nobody may try to log in as this account from this address; 0 for not at all."""
        now = self._clock()
        both, *others = self._keys(account, address)
        if now - self._known.get(both[0], -KNOWN_S) < KNOWN_S:
            others = others[:1]
        return max(self._wait(key, limit, now) for key, limit in (both, *others))

    def failed(self, account: str, address: str) -> None:
        """A login has failed, or is about to be tried: `succeeded` takes that back."""
        now = self._clock()
        for key, _ in self._keys(account, address):
            known = self._failures.pop(key, None)
            if known is None or now - known.at > FORGOTTEN_S:
                known = _Failures(0, now, now)
            known.count, known.at, known.before = known.count + 1, now, known.at
            self._failures[key] = known
        while len(self._failures) > MOST_KEPT:
            self._failures.popitem(last=False)

    def succeeded(self, account: str, address: str) -> None:
        """A login has succeeded: the account and the address together begin anew.

        What failed for the address in other names still counts: an attacker may have an account, too.
        """
        both, *others = (key for key, _ in self._keys(account, address))
        self._failures.pop(both, None)
        for key in others:
            if (known := self._failures.get(key)) is not None:
                known.count, known.at = known.count - 1, known.before
        self._known.pop(both, None)
        self._known[both] = self._clock()
        while len(self._known) > MOST_KEPT:
            self._known.popitem(last=False)

    def _wait(self, key: tuple[str, ...], limit: Limit, now: float) -> float:
        known = self._failures.get(key)
        if known is None or known.count < limit.free or now - known.at > FORGOTTEN_S:
            return 0.0
        seconds = min(limit.longest_s, 2.0 ** min(known.count - limit.free, 16))
        return max(0.0, known.at + seconds - now)

    @staticmethod
    def _keys(account: str, address: str) -> list[tuple[tuple[str, ...], Limit]]:
        net = network(address)
        return [(("both", account, net), PAIR), (("address", net), ADDRESS), (("account", account), ACCOUNT)]


def network(address: str) -> str:
    """What stands for an address: of version 6 the network of 64 bits, since whoever has one address has them all."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address[:64]
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is None:
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(getattr(found, "ipv4_mapped", None) or found)

"""Pace steering: how many boards are connected, and when the others come back (Bonawitz et al. 2019, section 2.3).

A fleet whose rounds ask few of its boards needs few connections. With a target, boards without a part are told to
disconnect and to come back later. The time is drawn: it depends on the numbers of boards, the target and what a round
needs, not on what other boards were told. Let a visit be `stay_s` long, which is the deadline of a round.

- *Many boards*: the target exceeds what a round needs. As soon as more are connected, those that were there for longest
  leave. Each comes back after an exponentially distributed time with the mean stay_s · (boards / target - 1), so that
  arrivals are independent of each other and replace the target once per visit, whatever happened before.
- *Few boards*: a round needs more boards at once than are to be connected on average. Then they meet: every
  stay_s · needed / target seconds, by the server's clock, they come back within a tenth of a visit, and leave when it
  is over. A board attends each meeting with the probability needed / boards.

A random number of boards with the mean n has the standard deviation √n. To be enough, meetings aim at three of those
more than a round needs.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from fedprune.core.rng import keyed
from fedprune.wire.fleet_messages import LONGEST_AWAY_S

COUNTED_S = 86_400.0
"""Seconds for which a board counts that is away without having been told for how long."""

RECONNECTS_PER_S = 200.0
"""Most boards that should arrive in a second after the broker was restarted: a fifth of what a server takes in on one
core."""

MOST_SPREAD_S = 600.0

_WINDOW = 0.1
"""Share of a visit in which boards arrive at a meeting."""

_GRACE_S = 60.0
"""A board that is so much later than the time for which it was sent away, and its spread, isn't counted on any more."""

_LOOK_S, _COUNT_S = 5.0, 600.0


@dataclass(frozen=True)
class Demand:
    """The demand of a server's jobs: boards that their rounds need at once, and seconds of a visit.

    Attributes:
        waiting: Whether a job has too few boards to begin a round.
    """

    needed: int
    stay_s: float
    waiting: bool = False


@dataclass(frozen=True)
class Plan:
    """The rule by which boards come and go, for a target above 0."""

    target: int
    demand: Demand

    @property
    def crowd(self) -> float:
        """Boards that are expected at a meeting."""
        return self.demand.needed + 3 * math.sqrt(self.demand.needed)

    @property
    def meets(self) -> bool:
        """Whether boards come together, since a round needs more of them at once than the target."""
        return self.crowd > self.target

    @property
    def most(self) -> int:
        """Boards that are connected at most, of those that can leave, while none of the others has a part."""
        return math.ceil(max(self.target, self.crowd))

    @property
    def period_s(self) -> float:
        """Seconds in which the connected boards are replaced once, on average."""
        if not self.meets:
            return self.demand.stay_s
        return min(LONGEST_AWAY_S, self.demand.stay_s * self.crowd / self.target)

    def away_s(self, boards: int, now: float, seed: int, *key: object) -> float:
        """Seconds after which a board comes back.

        Args:
            boards: The number of boards that take turns.
            now: Wall clock, in seconds.
            key: What the random number belongs to.
        """
        chance = keyed(seed, *key, "away")
        if not self.meets:
            mean = self.demand.stay_s * max(1.0, boards / self.target - 1)
            return max(
                1.0, float(mean * chance.exponential()) % LONGEST_AWAY_S
            )  # truncated, and exponential below that
        period = self.period_s
        missed = int(chance.geometric(min(1.0, self.crowd / max(1, boards))) - 1) % max(1, int(LONGEST_AWAY_S / period))
        arrival = chance.random() * _WINDOW * self.demand.stay_s
        return max(1.0, min(LONGEST_AWAY_S, (missed + 1) * period - now % period + arrival))


class PaceSteering:
    """Chooses the boards that leave, and the time at which each comes back.

    Args:
        target: Boards that are connected on average, in addition to those that can't leave; 0 to send none away.
        known: Boards that took part before this start of the server.
        now: Monotonic clock, as everywhere here unless said otherwise.
    """

    def __init__(self, target: int, seed: int, known: Iterable[str], now: float) -> None:
        self._target, self._seed = target, seed
        self._here: OrderedDict[str, float] = OrderedDict()  # able boards with the beginnings of their visits
        self._busy: dict[str, float] = {}  # those that had a part when it was their turn to leave
        self._connected: set[str] = set()
        self._away = dict.fromkeys(known, now + COUNTED_S)  # boards that come back, by the latest time
        self._able: set[str] = set()
        self._told_s = max(1.0, self.spread_s)
        self._looked_at = self._counted_at = now
        self._waiting_since: float | None = None

    @property
    def boards(self) -> int:
        """The number of boards that are connected, or are expected back."""
        return len(self._connected) + len(self._away)

    @property
    def spread_s(self) -> float:
        """Seconds over which boards are to spread their reconnects.

        The attempts of boards that each draw their next pause between 0 and s have at most the density 2 / s.
        """
        connected = self.boards if not self._target else min(self.boards, max(self._target, len(self._connected)))
        return min(MOST_SPREAD_S, 2 * connected / RECONNECTS_PER_S)

    def told(self) -> list[str]:
        """Boards that are to be told the spread again: all that understand it, each time it has doubled."""
        if self.spread_s < 2 * self._told_s:
            return []
        self._told_s = self.spread_s
        return sorted(self._able)

    def came(self, device: str, now: float, *, able: bool) -> None:
        """A board is connected. One that isn't `able` to leave for a time stays."""
        self._away.pop(device, None)
        self._connected.add(device)
        if able:
            self._able.add(device)
        if able and self._target and device not in self._busy:
            self._here.setdefault(device, now)

    def left(self, device: str, now: float) -> None:
        """A board has gone by itself, and is expected within a day."""
        self._connected.discard(device)
        self._able.discard(device)
        self._here.pop(device, None)
        self._busy.pop(device, None)
        self._away.setdefault(device, now + COUNTED_S)

    def leaving(self, now: float, wall: float, demand: Demand, works: Callable[[str], bool]) -> list[tuple[str, float]]:
        """Boards that are to disconnect now, and the seconds for which.

        Args:
            wall: Wall clock, in seconds.
            works: Whether a board has something to do.
        """
        if not self._target:
            return []
        self._look(now)
        staying = len(self._connected) - len(self._able)  # they are there in addition to the target
        plan = Plan(self._target, replace(demand, needed=max(0, demand.needed - staying)))
        if not demand.waiting:
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = now
        elif now - self._waiting_since > 2 * plan.period_s:
            return []  # fewer boards come than are expected: those that are here wait for each other
        found: list[tuple[str, float]] = []
        for _ in range(len(self._here)):
            device, since = next(iter(self._here.items()))
            over = plan.meets and now - since >= demand.stay_s
            if not over and len(self._able) <= plan.most:
                break
            del self._here[device]
            if works(device):
                self._busy[device] = since
                continue
            self._connected.discard(device)
            self._able.discard(device)
            away_s = plan.away_s(self.boards - staying + 1, wall, self._seed, device, round(wall))
            self._away[device] = now + away_s + self.spread_s + _GRACE_S
            found.append((device, away_s))
        return found

    def _look(self, now: float) -> None:
        """Put boards that had a part back in front, and strike off those that haven't come back."""
        if now - self._looked_at >= _LOOK_S:
            self._looked_at = now
            for device, since in self._busy.items():
                self._here[device] = since
                self._here.move_to_end(device, last=False)
            self._busy.clear()
        if now - self._counted_at >= _COUNT_S:
            self._counted_at = now
            self._away = {name: until for name, until in self._away.items() if until > now}

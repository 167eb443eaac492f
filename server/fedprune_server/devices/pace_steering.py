"""Pace steering: how many boards are connected, and when the others come back (Bonawitz et al. 2019, section 2.3).

A fleet whose rounds need few of its boards needs few connections. With a target, boards without a part are told to
disconnect and to come back later. That time is drawn at random: it depends on the number of boards, the target and the
demand of a round, not on the times of other boards. Let a visit be `stay_s` long, which is the deadline of a round.

- *Many boards*: the target exceeds what a round needs. As soon as more are connected, those that were there for longest
  leave. Each comes back after an exponentially distributed time with the mean stay_s · (boards / target - 1), so that
  arrivals are independent of each other and replace the target once per visit, whatever happened before.
- *Few boards*: a round needs more boards at once than are to be connected on average. Then they meet: every
  stay_s · needed / target seconds, by the server's clock, they come back within a tenth of a visit, and leave when it
  is over. A board attends each meeting with the probability needed / boards.

The number of boards that happen to attend, with the mean n, has the standard deviation √n. So meetings aim at three
standard deviations more than a round needs.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from fedprune.core.rng import keyed
from fedprune.wire.fleet_messages import LONGEST_AWAY_S

# Seconds for which a board counts as expected that has left by itself: nobody knows for how long.
COUNTED_S = 86_400.0

# Boards that should arrive in a second at most after the broker was restarted: a fifth of what a server handles on one
# core.
RECONNECTS_PER_S = 200.0

MOST_SPREAD_S = 600.0

# Share of a visit in which boards arrive at a meeting.
_WINDOW = 0.1

# Seconds beyond its time away and its spread after which a board is no longer expected.
_GRACE_S = 60.0

_LOOK_S, _COUNT_S = 5.0, 600.0


@dataclass(frozen=True)
class Demand:
    """The demand of a server's jobs.

    Attributes:
        needed: Boards that their rounds need at once.
        stay_s: Seconds of a visit.
        waiting: Whether a job has too few boards to begin a round.
    """

    needed: int
    stay_s: float
    waiting: bool = False


@dataclass(frozen=True)
class Plan:
    """The rule by which boards come and go (see the module), for a target above 0."""

    target: int
    demand: Demand

    @property
    def crowd(self) -> float:
        """Number of boards that are expected at a meeting."""
        return self.demand.needed + 3 * math.sqrt(self.demand.needed)

    @property
    def meets(self) -> bool:
        """Whether boards come at common times, because a round needs more of them at once than the target."""
        return self.crowd > self.target

    @property
    def most(self) -> int:
        """Maximum number of connected boards among those that can leave, apart from boards with a part."""
        return math.ceil(max(self.target, self.crowd))

    @property
    def period_s(self) -> float:
        """Seconds in which the connected boards are replaced once, on average."""
        if not self.meets:
            return self.demand.stay_s
        return min(LONGEST_AWAY_S, self.demand.stay_s * self.crowd / self.target)

    def away_s(self, boards: int, now: float, seed: int, *key: object) -> float:
        """Seconds after which a board is to come back, drawn at random.

        Args:
            boards: The number of boards that take turns.
            now: Wall clock, in seconds: meetings are at the same times for all boards.
            key: Keys the random number, together with the seed.
        """
        rng = keyed(seed, *key, "away")
        if not self.meets:
            mean = self.demand.stay_s * max(1.0, boards / self.target - 1)
            return max(1.0, float(mean * rng.exponential()) % LONGEST_AWAY_S)  # truncated, and exponential below that
        period = self.period_s
        skipped_meetings = int(rng.geometric(min(1.0, self.crowd / max(1, boards))) - 1) % max(
            1, int(LONGEST_AWAY_S / period)
        )
        arrival = rng.random() * _WINDOW * self.demand.stay_s
        return max(1.0, min(LONGEST_AWAY_S, (skipped_meetings + 1) * period - now % period + arrival))


class PaceSteering:
    """Chooses the boards that leave, and the time at which each comes back.

    Args:
        target: Number of boards that are connected on average, in addition to those that can't leave; 0 to send none
            away.
        known_boards: Boards that took part before this start of the server.
        now: Monotonic clock, as everywhere here unless said otherwise.
    """

    def __init__(self, target: int, seed: int, known_boards: Iterable[str], now: float) -> None:
        self._target, self._seed = target, seed
        self._here: OrderedDict[str, float] = OrderedDict()  # when each visit began; the earliest first
        self._busy: dict[str, float] = {}  # visits of boards that had a part when it was their turn to leave
        self._connected: set[str] = set()
        self._away = dict.fromkeys(known_boards, now + COUNTED_S)  # until when each absent board is expected
        self._able: set[str] = set()  # connected boards that can be sent away
        self._told_s = max(1.0, self.spread_s)
        self._looked_at = self._counted_at = now
        self._waiting_since: float | None = None

    @property
    def boards(self) -> int:
        """The number of boards that are connected or expected back."""
        return len(self._connected) + len(self._away)

    @property
    def spread_s(self) -> float:
        """Seconds over which boards are to spread their reconnects.

        The attempts of boards that each draw their next pause between 0 and s have at most the density 2 / s.
        """
        connected = self.boards if not self._target else min(self.boards, max(self._target, len(self._connected)))
        return min(MOST_SPREAD_S, 2 * connected / RECONNECTS_PER_S)

    def told(self) -> list[str]:
        """Boards that are to get the spread again: all that understand it, each time it has doubled."""
        # Not with every board that comes: a fleet of n boards then gets log n messages each, not n.
        if self.spread_s < 2 * self._told_s:
            return []
        self._told_s = self.spread_s
        return sorted(self._able)

    def came(self, device: str, now: float, *, able: bool) -> None:
        """Note that a board is connected. One that isn't `able` to leave for a time stays."""
        self._away.pop(device, None)
        self._connected.add(device)
        if able:
            self._able.add(device)
        if able and self._target and device not in self._busy:
            self._here.setdefault(device, now)

    def left(self, device: str, now: float) -> None:
        """Note that a board has left by itself; it is expected within a day."""
        self._connected.discard(device)
        self._able.discard(device)
        self._here.pop(device, None)
        self._busy.pop(device, None)
        self._away.setdefault(device, now + COUNTED_S)

    def leaving(
        self, now: float, wall_now: float, demand: Demand, has_work: Callable[[str], bool]
    ) -> list[tuple[str, float]]:
        """Choose the boards that are to disconnect now, with the seconds for which they are to stay away.

        Args:
            wall_now: Wall clock, in seconds.
            has_work: Whether a job awaits a part of a board.
        """
        if not self._target:
            return []
        self._look(now)
        staying = len(self._connected) - len(self._able)  # connected in addition to the target, whatever it is
        plan = Plan(self._target, replace(demand, needed=max(0, demand.needed - staying)))
        if not demand.waiting:
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = now
        elif now - self._waiting_since > 2 * plan.period_s:
            return []  # fewer boards come than expected: the connected ones must wait for each other
        leaving: list[tuple[str, float]] = []
        for _ in range(len(self._here)):
            device, visit_began_at = next(iter(self._here.items()))
            is_visit_over = plan.meets and now - visit_began_at >= demand.stay_s
            if not is_visit_over and len(self._able) <= plan.most:
                break
            del self._here[device]
            if has_work(device):
                self._busy[device] = visit_began_at
                continue
            self._connected.discard(device)
            self._able.discard(device)
            away_s = plan.away_s(self.boards - staying + 1, wall_now, self._seed, device, round(wall_now))
            self._away[device] = now + away_s + self.spread_s + _GRACE_S
            leaving.append((device, away_s))
        return leaving

    def _look(self, now: float) -> None:
        """Make boards that had a part the next to leave again, and forget boards that haven't come back in time."""
        if now - self._looked_at >= _LOOK_S:
            self._looked_at = now
            for device, visit_began_at in self._busy.items():
                self._here[device] = visit_began_at
                self._here.move_to_end(device, last=False)
            self._busy.clear()
        if now - self._counted_at >= _COUNT_S:
            self._counted_at = now
            self._away = {name: until for name, until in self._away.items() if until > now}

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

from fedprune.core.rng import keyed_generator
from fedprune.wire.fleet_messages import MAX_BOARD_AWAY_S

# Seconds for which a board counts as expected that has left by itself: nobody knows for how long.
AWAY_COUNTED_S = 86_400.0

# Boards that should arrive in a second at most after the broker was restarted: a fifth of what a server handles on one
# core.
MAX_RECONNECTS_PER_S = 200.0

MAX_SPREAD_S = 600.0

# Share of a visit in which boards arrive at a meeting.
_ARRIVAL_SHARE = 0.1

# Seconds beyond its time away and its spread after which a board is no longer expected.
_GRACE_S = 60.0

_BUSY_RECHECK_S, _EXPIRY_INTERVAL_S = 5.0, 600.0


@dataclass(frozen=True)
class Demand:
    """The demand of a server's jobs: boards that their rounds need at once, the seconds of a visit, and whether a job
    waits for boards to begin a round."""

    needed: int
    stay_s: float
    waiting: bool = False


@dataclass(frozen=True)
class VisitPlan:
    """The rule by which boards come and go (see the module), for a target above 0."""

    target: int
    demand: Demand

    @property
    def expected_at_meeting(self) -> float:
        """Number of boards that are expected at a meeting."""
        return self.demand.needed + 3 * math.sqrt(self.demand.needed)

    @property
    def needs_meetings(self) -> bool:
        """Whether boards come at common times, because a round needs more of them at once than the target."""
        return self.expected_at_meeting > self.target

    @property
    def period_s(self) -> float:
        """Seconds in which the connected boards are replaced once, on average."""
        if not self.needs_meetings:
            return self.demand.stay_s
        return min(MAX_BOARD_AWAY_S, self.demand.stay_s * self.expected_at_meeting / self.target)

    def away_s(self, boards: int, now: float, seed: int, *key: object) -> float:
        """Seconds after which a board is to come back, drawn at random by `seed` and `key`. `boards` share the places.
        `now` is the wall clock, in seconds: meetings are at the same times for all boards."""
        rng = keyed_generator(seed, *key, "away")
        if self.needs_meetings:
            # Meetings begin at multiples of `period_s`; the board skips a random number of them.
            skipped_meetings = int(rng.geometric(min(1.0, self.expected_at_meeting / max(1, boards)))) - 1
            skipped_meetings %= max(1, int(MAX_BOARD_AWAY_S / self.period_s))
            arrival = rng.random() * _ARRIVAL_SHARE * self.demand.stay_s
            next_meeting_s = (skipped_meetings + 1) * self.period_s - now % self.period_s
            return max(1.0, min(MAX_BOARD_AWAY_S, next_meeting_s + arrival))
        mean = self.demand.stay_s * max(1.0, boards / self.target - 1)
        return max(1.0, float(mean * rng.exponential()) % MAX_BOARD_AWAY_S)  # truncated, and exponential below that


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
        self._visits: OrderedDict[str, float] = OrderedDict()  # when each visit began; the earliest first
        self._postponed_visits: dict[str, float] = {}  # of boards that should have left, and had a part in a round
        self._connected: set[str] = set()
        self._expected_until = dict.fromkeys(known_boards, now + AWAY_COUNTED_S)  # for each absent board
        self._able_to_leave: set[str] = set()  # connected boards that can be sent away
        self._announced_spread_s = max(1.0, self.spread_s)
        self._rechecked_at = self._expired_at = now
        self._waiting_since: float | None = None

    @property
    def boards(self) -> int:
        """The number of boards that are connected or expected back."""
        return len(self._connected) + len(self._expected_until)

    @property
    def spread_s(self) -> float:
        """Seconds over which boards are to spread their reconnects.

        The attempts of boards that each draw their next pause between 0 and s have at most the density 2 / s.
        """
        connected = self.boards if not self._target else min(self.boards, max(self._target, len(self._connected)))
        return min(MAX_SPREAD_S, 2 * connected / MAX_RECONNECTS_PER_S)

    def take_spread_recipients(self) -> list[str]:
        """Boards that are to get the spread again: all that understand it, each time it has doubled."""
        # Not with every board that comes: a fleet of n boards then gets log n messages each, not n.
        if self.spread_s < 2 * self._announced_spread_s:
            return []
        self._announced_spread_s = self.spread_s
        return sorted(self._able_to_leave)

    def on_connect(self, device: str, now: float, *, able: bool) -> None:
        """Note that a board is connected. One that isn't `able` to leave for a time stays."""
        self._expected_until.pop(device, None)
        self._connected.add(device)
        if able:
            self._able_to_leave.add(device)
        if able and self._target and device not in self._postponed_visits:
            self._visits.setdefault(device, now)

    def on_disconnect(self, device: str, now: float) -> None:
        """Note that a board has left by itself; it is expected within a day."""
        self._connected.discard(device)
        self._able_to_leave.discard(device)
        self._visits.pop(device, None)
        self._postponed_visits.pop(device, None)
        self._expected_until.setdefault(device, now + AWAY_COUNTED_S)

    def choose_leaving(
        self, now: float, wall_now: float, demand: Demand, has_work: Callable[[str], bool]
    ) -> list[tuple[str, float]]:
        """Choose the boards that are to disconnect now, with the seconds for which they are to stay away. `wall_now` is
        the wall clock, in seconds; `has_work` says whether a job awaits a part of a board."""
        if not self._target:
            return []
        self._recheck(now)
        staying = len(self._connected) - len(self._able_to_leave)  # connected in addition to the target, whatever it is
        plan = VisitPlan(self._target, replace(demand, needed=max(0, demand.needed - staying)))
        if not demand.waiting:
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = now
        elif now - self._waiting_since > 2 * plan.period_s:
            return []  # fewer boards come than expected: the connected ones must wait for each other
        leaving: list[tuple[str, float]] = []
        for _ in range(len(self._visits)):
            device, visit_began_at = next(iter(self._visits.items()))
            is_visit_over = plan.needs_meetings and now - visit_began_at >= demand.stay_s
            if not is_visit_over and len(self._able_to_leave) <= max(plan.target, math.ceil(plan.expected_at_meeting)):
                break
            del self._visits[device]
            if has_work(device):
                self._postponed_visits[device] = visit_began_at
                continue
            self._connected.discard(device)
            self._able_to_leave.discard(device)
            away_s = plan.away_s(self.boards - staying + 1, wall_now, self._seed, device, round(wall_now))
            self._expected_until[device] = now + away_s + self.spread_s + _GRACE_S
            leaving.append((device, away_s))
        return leaving

    def _recheck(self, now: float) -> None:
        """Make boards that had a part the next to leave again, and forget boards that haven't come back in time."""
        if now - self._rechecked_at >= _BUSY_RECHECK_S:
            self._rechecked_at = now
            for device, visit_began_at in self._postponed_visits.items():
                self._visits[device] = visit_began_at
                self._visits.move_to_end(device, last=False)
            self._postponed_visits.clear()
        if now - self._expired_at >= _EXPIRY_INTERVAL_S:
            self._expired_at = now
            self._expected_until = {name: until for name, until in self._expected_until.items() if until > now}

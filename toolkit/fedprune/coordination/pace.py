"""How long a synchronous round waits for a device, by what it is seen to do instead of by a fixed time alone.

One rule, with one number, the job's `pace`: **a round bears `pace` times what half of its devices took** from offer to
announcement. From when that half is in, a device is given up

- as *too slow* when it has taken longer than that already, or when its own reports say that it will: it trains on as
  fast as it did between its first report and its last.

And at any time, however far the others are,

- as *silent* when the next tenth of its training takes `pace` times as long as its tenths did so far.

All of that counts by the server's clock: a device says what share it has done, never when. `deadline_s` stays the most
that anybody has. Devices are looked at every twentieth part of it, which also is the least that anybody is given: what
messages take, and a pause of moments, decides nothing. Who has announced its update is done, and may take its time with
the upload, up to the deadline; so may who trains, has told of its last step, and evaluates.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from fedprune.jobs.state import Progress, Task

PARTS = 10
"""A device's training is told of in so many parts."""

LOOKS = 20
"""How often devices are looked at while a deadline passes."""

SLOW = "much slower than the other devices of the round"
SILENT = "no progress for much longer than before"


def share_of(phase: str, done: int, total: int) -> float | None:
    """How much of its training a device has done, from 0 to 1, by its own report; None where that says nothing of it.

    Args:
        phase: `download`, `train` or `evaluate`, which comes before training (0 done) and after it.
        done: Units done in this phase.
        total: Units of this phase.
    """
    if phase == "train" and total > 0:
        return min(done, total) / total
    return 1.0 if phase == "evaluate" and done > 0 else None


def news(task: Task, share: float) -> bool:
    """Whether a report has to be told to the coordinator: the first, and one for every tenth."""
    return task.heard is None or math.floor(PARTS * share) > math.floor(PARTS * task.heard[1])


def note(task: Task, share: float, now: float) -> None:
    """Take in a report."""
    if task.progress is Progress.OFFERED and news(task, share):
        task.heard = [now, share]
        task.begun = task.begun or task.heard


class Pace:
    """The rule, with its numbers.

    Args:
        times: The job's `pace`.
        deadline_s: What everybody has at most.
    """

    def __init__(self, times: float, deadline_s: float) -> None:
        self._times = times
        self._least = deadline_s / LOOKS

    def bears(self, tasks: Collection[Task]) -> float:
        """Seconds from offer to announcement that a round waits for a device; infinity until half of them are in."""
        took = sorted(t.trained_s for t in tasks if t.trained_s is not None)
        half = (len(tasks) + 1) // 2
        return max(self._least, self._times * took[half - 1]) if len(took) >= half else math.inf

    def verdict(self, task: Task, bears: float, now: float) -> str:
        """Why a device that works on its offer is given up; empty if it isn't.

        Args:
            task: Its part.
            bears: What `bears` says of the round.
            now: The server's clock.
        """
        if task.progress is not Progress.OFFERED or task.offered_at is None:  # a restart lies between
            return ""
        if self._ends(task, now) - task.offered_at > bears:
            return SLOW
        return SILENT if self._quiet(task, now) else ""

    def _ends(self, task: Task, now: float) -> float:
        """When its training will be over, as far as that can be told, but not before now."""
        rate = _rate(task)
        if rate is None or task.heard is None:
            return now
        at, share = task.heard
        return max(now, at + (1 - share) * rate)

    def _quiet(self, task: Task, now: float) -> bool:
        rate = _rate(task)
        if rate is None or task.heard is None or task.heard[1] >= 1:
            return False
        return now - task.heard[0] > max(self._least, self._times * rate / PARTS)


def _rate(task: Task) -> float | None:
    """Seconds for a whole training, as fast as it was so far; None before two reports."""
    if task.begun is None or task.heard is None or task.heard[1] <= task.begun[1]:
        return None
    return max(0.0, task.heard[0] - task.begun[0]) / (task.heard[1] - task.begun[1])

"""How long a job waits for a device's answer: one policy for rounds of all schedules and for steps of secure sums.

A wait starts from what the device's last answers of this kind took. A device that has never answered gets a multiple
of what is predicted for it, and without a prediction the job's deadline. Silence doubles the next wait, since the
device may just have become slower. After `MAX_FAILURES` failures in a row the device is excluded; after silence it is
asked again when it answers before the deadline, or after a time that doubles, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fedprune.jobs.state import JobDevice

# Offers refused, updates rejected or waits in vain, in a row, after which a device is left out. One that fails always
# would otherwise be offered every round, and make others wait for it.
MAX_FAILURES = 3

# The same of sums of masked updates: one that fails costs all of its devices a round's work.
MAX_SUM_FAILURES = 2

# The kind of the answer to an offer. Those of secure sums are called by their steps.
ROUND = "round"

# The first round of a connection downloads and compiles graphs, so that later rounds say nothing of it.
_FIRST_ROUND = "first round"
_SIZE = "size of a round"

# Multiples of the slowest of the last answers: a busy board is throttled to a quarter of its clock rate.
_FACTOR = 4.0

# The same of predictions: they know neither graphs nor validation, and a board's measurements may be missing.
_UNMEASURED_FACTOR = 10.0

# A lost packet or a new connection to the broker takes a second or two.
_FLOOR_S = 3.0

# What a device that works may take for its first answer since it connected: a board loads onnxruntime and graphs from
# its card first, which may take a slow or busy one longer than a small model's whole training is predicted to.
_FIRST_ANSWER_S = 60.0

# What remains per answer of a slow answer's influence.
_DECAY = 0.5

_MAX_DOUBLINGS = 8


class Patience:
    """Waits of at most `deadline_s`, for which the slowest round of any of the `devices` counts: it shows where
    predictions are too short for all. It has no clock: times are seconds on the caller's."""

    def __init__(self, deadline_s: float, devices: Iterable[JobDevice] = ()) -> None:
        self._deadline_s = deadline_s
        self._slowest_s = max((device.answer_s.get(ROUND, 0.0) for device in devices), default=0.0)

    def limit_s(
        self, device: JobDevice, kind: str, predict: Callable[[], float | None] = lambda: None, size: float = 1.0
    ) -> float:
        """Seconds to wait for an answer of a kind. `size` is that of a round's training in any unit: a larger one than
        the last takes longer."""
        answers = device.answer_s
        round_s = answers.get(ROUND, answers.get(_FIRST_ROUND))
        if kind in answers or (kind == ROUND and round_s is not None):
            growth = max(1.0, size / answers.get(_SIZE, size)) if kind == ROUND else 1.0
            seconds = _FACTOR * growth * answers.get(kind, round_s or 0.0)
        else:
            expected_s = predict() if round_s is None else round_s
            seconds = _UNMEASURED_FACTOR * expected_s if expected_s is not None else self._deadline_s
            seconds = max(seconds, _FACTOR * self._slowest_s)
        return min(self._deadline_s, max(_FLOOR_S, seconds) * 2.0 ** min(device.failures, _MAX_DOUBLINGS))

    def working_limit_s(self, device: JobDevice) -> float:
        """Seconds to wait at least, since its offer, for a device that is seen to work on it."""
        return 0.0 if ROUND in device.answer_s else min(self._deadline_s, _FIRST_ANSWER_S)

    def exclusion_s(self, device: JobDevice) -> float:
        """Seconds for which a device is excluded that was silent too often."""
        return self._deadline_s * 2.0 ** max(0, min(1 + device.failures - MAX_FAILURES, _MAX_DOUBLINGS))

    def note_answer(self, device: JobDevice, kind: str, seconds: float, size: float | None = None) -> None:
        """Remember what an answer took."""
        answers = {kind: max(seconds, _DECAY * device.answer_s.get(kind, 0.0))}
        self._slowest_s = max(self._slowest_s, seconds if kind == ROUND else 0.0)
        if kind == ROUND and ROUND not in device.answer_s:
            answers[_FIRST_ROUND] = seconds
        if size is not None:
            answers[_SIZE] = size
        device.answer_s = device.answer_s | answers


def answers_of_earlier_connections(device: JobDevice) -> dict[str, float]:
    """What a device's answers say of the first round of its next connection."""
    return {kind: seconds for kind, seconds in device.answer_s.items() if kind in (_FIRST_ROUND, _SIZE)}

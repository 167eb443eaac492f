"""A cohort of a secure sum: the devices that were sent the same submodel, and how far their sum is.

`MaskedChannel` (`engine.secure_sums`) sends the messages of each step, and passes the devices' answers to the cohort.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from fedprune.coordination.masked import cohort_sum_line
from fedprune.core.errors import ConfigError, ProtocolError
from fedprune.core.text import one_line, sentences
from fedprune.secure_aggregation.collector import Collector, FalseSharesError
from fedprune.secure_aggregation.messages import decode_roster
from fedprune.secure_aggregation.session import MIN_BOARDS, SecureSumSession
from fedprune.secure_aggregation.vector_form import MaskedForm
from fedprune.security.keys import KEY_BYTES, VerifyingKey
from fedprune.wire.messages import Accepted

log = logging.getLogger("fedprune.server")

# The protocol's steps (docs/secure-aggregation.md), by the server's message that begins each.
_STEP_NAMES = {"session": "keys", "roster": "shares", "delivery": "masks", "survivors": "unmasking"}

# Share of a cohort's boards that may drop out after the step of keys. A larger share needs more neighbours per board,
# and so more shares and key agreements.
_DROPOUT_SHARE = 0.2

_RANDOM_BYTES = 16


@dataclass
class Cohort:
    """One secure sum.

    Attributes:
        sum_id: Random id of the sum.
        identity_keys: Identity keys by device, as they came over the devices' connections.
        step: The server's last step.
        messages: The server's messages of this step, by device.
        answered: Devices that have answered the step.
        awaited: Devices for whose answers the step waits, unless they are offline.
        announced_digests: Digest of the masked vector that a device has announced, by device.
        acceptances: The message that will accept a device's masked vector, by device.
        drop_reasons: The reason, by device that was dropped for one.
        missed_steps: The first step that a device didn't answer, by device that has dropped out for whatever reason.
        pending_work: Tasks of the thread, in its order, with the device that each concerns; an empty name for the sum
            itself.
        step_began_at: The time at which the step began; 0 until the next turn.
        answer_s: By device and name of a step, what its answers took.
        silent_devices: By device that has let the time of a step pass while it was connected, the step's name.
        total_digest: Digest of the sum, once it is stored.
        failure: The reason why there is no sum; empty if there is one.
        has_false_shares: Whether a board's false shares are that reason.
    """

    session: SecureSumSession
    devices: tuple[str, ...]
    sum_id: str = field(default_factory=lambda: secrets.token_hex(_RANDOM_BYTES))
    identity_keys: dict[str, VerifyingKey] = field(default_factory=dict)
    step: str = ""
    messages: dict[str, bytes] = field(default_factory=dict)
    answered: set[str] = field(default_factory=set)
    awaited: set[str] = field(default_factory=set)
    announced_digests: dict[str, str] = field(default_factory=dict)
    acceptances: dict[str, Accepted] = field(default_factory=dict)
    drop_reasons: dict[str, str] = field(default_factory=dict)
    missed_steps: dict[str, str] = field(default_factory=dict)
    pending_work: deque[tuple[str, Future[Any]]] = field(default_factory=deque)
    step_began_at: float = 0.0
    answer_s: dict[str, dict[str, float]] = field(default_factory=dict)
    silent_devices: dict[str, str] = field(default_factory=dict)
    total_digest: str = ""
    failure: str = ""
    has_false_shares: bool = False

    def __post_init__(self) -> None:
        self.collector = Collector(self.session, self.identity_keys)

    @property
    def is_over(self) -> bool:
        return bool(self.total_digest or self.failure)

    def answer(self, device: str, now: float) -> None:
        self.answered.add(device)
        self.answer_s.setdefault(device, {})[self.step_name] = max(0.0, now - (self.step_began_at or now))
        self.awaited.discard(device)

    def drop(self, device: str, reason: str) -> None:
        self.drop_reasons[device] = reason
        self.awaited.discard(device)
        self.note_missed_step((device,))

    def note_missed_step(self, devices: Iterable[str]) -> None:
        for device in devices:
            self.missed_steps.setdefault(device, self.step_name)

    @property
    def step_name(self) -> str:
        return _STEP_NAMES[self.step]

    def add_answer(self, device: str, step: str, content: bytes, now: float) -> None:
        """Add a device's answer. Raises `ProtocolError` or `SignatureError`."""
        if step == "keys":
            self.identity_keys.setdefault(device, VerifyingKey(content[:KEY_BYTES]))
            self.collector.add_advertisement(device, content[KEY_BYTES:])
        elif step == "shares":
            self.collector.add_shares(device, content)
        else:
            self.collector.add_unmasking(device, content)
        self.answer(device, now)

    def rosters(self) -> dict[str, bytes]:
        """Each device's neighbours: their identity keys, and the collector's roster."""
        rosters = self.collector.rosters()
        neighbours_of = {device: tuple(decode_roster(roster, self.session)) for device, roster in rosters.items()}
        return {
            device: len(neighbours).to_bytes(2, "big")
            + b"".join(self.identity_keys[neighbour].raw for neighbour in neighbours)
            + rosters[device]
            for device, neighbours in neighbours_of.items()
        }

    def take_results(self) -> None:
        """Handle the results of the thread. Raises `StorageError` if the disk has failed; a device whose vector is lost
        by that is awaited again."""
        while self.pending_work and self.pending_work[0][1].done():
            device, future = self.pending_work.popleft()
            error = future.exception()
            if error is None:
                self.total_digest = self.total_digest if device else future.result()
            elif not isinstance(error, ProtocolError):
                if device:
                    self.answered.discard(device)
                    self.awaited.add(device)
                raise error
            elif device:
                self.drop(device, one_line(str(error)))
            else:
                self.fail(error)

    def fail(self, error: Exception) -> None:
        self.failure = one_line(sentences(f"the secure sum failed: {error}", cohort_sum_line(self.report())))
        self.has_false_shares = isinstance(error, FalseSharesError)
        log.warning("%s", self.failure)

    def absence_reasons(self) -> dict[str, str]:
        """The reasons of the devices that are not in the sum, by device."""
        summed = self.collector.boards if self.total_digest else ()
        step_reasons = {
            name: f"it dropped out of the secure sum at the step of {step}" for name, step in self.missed_steps.items()
        }
        reasons = {name: self.drop_reasons.get(name) or step_reasons.get(name) or self.failure for name in self.devices}
        return {name: reason or "no neighbour is left" for name, reason in reasons.items() if name not in summed}

    def report(self) -> dict[str, Any]:
        """A report on the sum, as in `on.Unmasked`. A board that drops out after its vector has arrived is summed."""
        summed = self.collector.boards if self.total_digest else ()
        lost: dict[str, list[str]] = {}
        for name, step in sorted(self.missed_steps.items()):
            if name not in summed:
                lost.setdefault(step, []).append(name)
        return {"boards": len(self.devices), "summed": len(summed), "lost": lost}


def sum_session(job: str, round_: int, task: str, boards: int, form: MaskedForm) -> SecureSumSession:
    """The session of a sum of this many boards. Raises `ConfigError` if they are too few.

    A fifth of the boards may drop out after the step of keys, and in small cohorts as many as k − t allows: k is even
    and less than the number of boards, t is k/2 + 1.
    """
    if boards < MIN_BOARDS:
        raise ConfigError("boards of the same channels in a secure sum", expected=f"{MIN_BOARDS} or more", got=boards)
    context = json.dumps([job, round_, secrets.token_hex(_RANDOM_BYTES)]).encode()
    dropout_share = min(_DROPOUT_SHARE, (boards - MIN_BOARDS) // 2 / boards)
    return SecureSumSession.choose(context, boards, form.narrow, form.wide, task=task, dropping=dropout_share)

"""The demo's fleet: six boards of five kinds, their links, and the two jobs that are compared.

Widths are not set here. The boards are shipped hardware profiles with different links (a modem with a data plan, a
shared uplink, a cable), from which the planner derives widths.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.planning.profile import HardwareProfile
from fedprune.planning.profile_store import find
from fedprune_server.simulation.experiment import fedavg

ROUNDS = 24
QUICK_ROUNDS = 2
BYTE_BUDGET = 430_000
"""Bytes per device and round, both ways, that the fleet's job allows."""

_DEADLINE_S = 60.0


@dataclass(frozen=True)
class Board:
    """One board of the demo.

    Attributes:
        name: Its name.
        kind: Name of a shipped profile.
        link: Its link.
        bytes_per_round: Bytes per round, both ways, that the link may carry; None for the profile's figure.
    """

    name: str
    kind: str
    link: str = ""
    bytes_per_round: int | None = None

    def profile(self) -> HardwareProfile:
        """The shipped profile with this board's link.

        Raises:
            ProfileError: The shipped profile is missing or damaged.
        """
        shipped = find(self.kind)
        if self.bytes_per_round is None:
            return shipped
        return replace(
            shipped,
            name=f"{shipped.name}-{self.link}",
            link=replace(shipped.link, bytes_per_round=self.bytes_per_round),
            sources={**shipped.sources, "link.bytes_per_round": f"estimate: demo, a board that hangs on a {self.link}"},
        )


BOARDS = (
    Board("attic-zero", "raspberry-pi-zero-2w", "metered-modem", 290_000),
    Board("barn-zero", "raspberry-pi-zero-2w", "metered-modem", 290_000),
    Board("yard-pi4", "raspberry-pi-4b", "shared-uplink", 350_000),
    Board("hall-pi5", "raspberry-pi-5"),
    Board("dock-orin", "jetson-orin-nano"),
    Board("desk-x86", "generic-x86-64"),
)


def fleet_job(seed: int = 0, rounds: int = ROUNDS) -> Job:
    """The fleet's job: planned widths and the recommended strategy."""
    return Job(
        name="fleet",
        seed=seed,
        rounds=rounds,
        devices=len(BOARDS),
        deadline_s=_DEADLINE_S,
        byte_budget=BYTE_BUDGET,
        strategy="fedprune",
        recipe=Recipe(epochs=3, batch_size=32, lr=0.03, momentum=0.9),
    )


def too_few(rounds: int) -> str:
    """Reason not to judge a demo of so few rounds; empty if it is judged."""
    if rounds >= ROUNDS:
        return ""
    return f"Too few rounds to judge accuracies and bytes by: {rounds}; the demo takes {ROUNDS}."


def reference_job(seed: int = 0, rounds: int = ROUNDS) -> Job:
    """FedAvg on the same boards, with the same rounds and steps."""
    return fedavg(fleet_job(seed, rounds))

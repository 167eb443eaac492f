"""The fleet of `fedprune-server demo`: six boards with different links, and the bundled images of digits.

It sets no widths: its boards are shipped hardware profiles with different links (a modem with a data plan, a shared
uplink, a cable), from which the planner derives them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.planning.profile import HardwareProfile
from fedprune.planning.profile_store import find_profile
from fedprune_export.importing import import_onnx
from fedprune_server.simulation.datasets.fleet_data import FleetData
from fedprune_server.simulation.digits import DIGITS_TITLE, deal_digits, digits_model
from fedprune_server.simulation.experiment import fedavg_job
from fedprune_server.simulation.fleet.simulated_fleet import FleetPlan
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice

DEMO_ROUNDS = 24
DEMO_QUICK_ROUNDS = 2
DEMO_BYTE_BUDGET = 195_000  # bytes per device and round, both ways, that the fleet's job allows

_DEADLINE_S = 60.0


@dataclass(frozen=True)
class DemoBoard:
    """One board of the demo.

    Attributes:
        kind: Name of a shipped profile.
        bytes_per_round: Bytes per round, both ways, that the link may carry; None for the profile's figure.
    """

    name: str
    kind: str
    link: str = ""
    bytes_per_round: int | None = None

    def profile(self) -> HardwareProfile:
        """The shipped profile with this board's link. Raises `ProfileError` if the shipped profile is missing or
        damaged."""
        shipped = find_profile(self.kind)
        if self.bytes_per_round is None:
            return shipped
        return replace(
            shipped,
            name=f"{shipped.name}-{self.link}",
            link=replace(shipped.link, bytes_per_round=self.bytes_per_round),
            sources={**shipped.sources, "link.bytes_per_round": f"estimate: demo, a board that hangs on a {self.link}"},
        )


DEMO_BOARDS = (
    DemoBoard("attic-zero", "raspberry-pi-zero-2w", "metered-modem", 120_000),
    DemoBoard("barn-zero", "raspberry-pi-zero-2w", "metered-modem", 120_000),
    DemoBoard("yard-pi4", "raspberry-pi-4b", "shared-uplink", 142_000),
    DemoBoard("hall-pi5", "raspberry-pi-5"),
    DemoBoard("dock-orin", "jetson-orin-nano"),
    DemoBoard("desk-x86", "generic-x86-64"),
)


def demo_job(seed: int = 0, rounds: int = DEMO_ROUNDS) -> Job:
    """The fleet's job: planned widths and the recommended strategy."""
    return Job(
        name="fleet",
        seed=seed,
        rounds=rounds,
        devices=len(DEMO_BOARDS),
        deadline_s=_DEADLINE_S,
        byte_budget=DEMO_BYTE_BUDGET,
        strategy="fedprune",
        recipe=Recipe(epochs=3, batch_size=32, lr=0.03, momentum=0.9),
    )


def too_few_rounds(rounds: int) -> str:
    """Reason not to judge a demo of so few rounds; empty if it is judged."""
    if rounds >= DEMO_ROUNDS:
        return ""
    return f"Too few rounds to judge accuracies and bytes by: {rounds}; the demo takes {DEMO_ROUNDS}."


def demo_plan(*, strategy: str | None = None, seed: int | None = None, rounds: int | None = None) -> FleetPlan:
    """The fleet of `fedprune-server demo`, and FedAvg on the same devices.

    `strategy` replaces the demo's; the reference stays FedAvg. Raises `ConfigError` if one of them is wrong.
    """
    data = deal_digits([b.name for b in DEMO_BOARDS], seed=seed or 0)
    job = demo_job(seed or 0, DEMO_ROUNDS if rounds is None else rounds)
    return FleetPlan(
        strategy or job.strategy,
        replace(job, strategy=strategy or job.strategy),
        import_onnx(digits_model(), "digits-net"),
        tuple(VirtualDevice(b.name, b.profile(), data.devices[b.name]) for b in DEMO_BOARDS),
        (data.x, data.y),
        data.calibration,
        partition=FleetData.of_devices(data.devices, DIGITS_TITLE),
        reference=fedavg_job(job),
    )

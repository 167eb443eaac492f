"""Which hardware profile fits a board: by its device tree, then its memory and clock.

Names alone don't suffice: modules sit on other makers' carriers with names of their own, and boards of one name come
with other memory or a slower processor. So the evidence is kept and shown.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedprune.core.errors import ProfileError
from fedprune.planning import profile_store
from fedprune.planning.jetpack_releases import JetPack, jetpack_of_release
from fedprune.planning.profile import HardwareProfile

# Firmware and kernel take up to this share of a board's memory before Linux counts it.
_MEMORY_SLACK = 0.15

_CLOCK_SLACK = 0.05


@dataclass(frozen=True)
class BoardFacts:
    """What a board's system says of the board.

    Attributes:
        model: /proc/device-tree/model; empty if it does not exist.
        compatible: The entries of /proc/device-tree/compatible, such as "nvidia,tegra234".
        l4t: The L4T release of a Jetson, such as "36.4.3"; empty elsewhere.
        machine: The architecture (`uname -m`).
        memory_total: MemTotal in bytes; None if not known.
        clock_hz: Highest clock of the processor; None if not known.
    """

    model: str = ""
    compatible: tuple[str, ...] = ()
    l4t: str = ""
    machine: str = field(default_factory=platform.machine)
    memory_total: int | None = None
    clock_hz: int | None = None


@dataclass(frozen=True)
class Identification:
    """A profile, the evidence for it, how the board differs from it, and the JetPack release of a known L4T release."""

    profile: HardwareProfile
    evidence: tuple[str, ...]
    differences: tuple[str, ...]
    jetpack: JetPack | None

    @property
    def is_certain(self) -> bool:
        """Whether the board's own name was known, and not just its processor or architecture."""
        return bool(self.profile.identify) and any(e.startswith("device tree: ") for e in self.evidence)

    def to_dict(self) -> dict[str, Any]:
        return {
            "profile": self.profile.name,
            "title": self.profile.title,
            "support": self.profile.support,
            "advice": self.profile.advice,
            "certain": self.is_certain,
            "evidence": list(self.evidence),
            "differences": list(self.differences),
            "jetpack": self.jetpack.name if self.jetpack is not None else None,
        }

    def describe(self) -> str:
        lines = [f"{self.profile.name}: {self.profile.title}"]
        lines += [f"  because of {e}" for e in self.evidence]
        lines += [f"  but {d}" for d in self.differences]
        if self.profile.advice:
            lines.append(f"  limited support: {self.profile.advice}")
        return "\n".join(lines)


def identify(facts: BoardFacts, folders: Sequence[Path] = ()) -> Identification:
    """The profile that fits a board best, of a user's own folders or the shipped ones.

    The longest text of `identify` that occurs in the model or in an entry of `compatible` decides; without any, the
    processor's name (`soc`), and without that, the architecture. Among profiles that are equal in this, the one whose
    memory fits, then the one whose clock fits is taken; where nothing tells them apart, the one with less memory.
    Raises `ProfileError` if no profile fits and there is no generic one, or the L4T release is no number.
    """
    jetpack_release = jetpack_of_release(facts.l4t) if facts.l4t else None
    profiles = [profile_store.find_profile(name, folders) for name in profile_store.profile_names(folders)]
    profiles = [p for p in profiles if p.arch == facts.machine]
    texts = (facts.model, *facts.compatible)
    matches = [(len(t), p, t) for p in profiles for t in p.identify if any(t in text for text in texts)]
    if matches:
        # The longer text is the more particular one.
        longest = max(length for length, _, _ in matches)
        fitting = [p for length, p, _ in matches if length == longest]
        evidence = [f"device tree: {next(t for length, _, t in matches if length == longest)}"]
    elif fitting := [p for p in profiles if p.soc and any(c.rpartition(",")[2] == p.soc for c in facts.compatible)]:
        evidence = [f"processor: {fitting[0].soc}"]
    else:
        fitting = [_generic_profile(facts, folders)]
        evidence = [f"architecture: {facts.machine}"]
    profile = min(fitting, key=lambda p: (*_profile_distance(p, facts), p.memory.total_bytes, p.name))
    if len(fitting) > 1:
        if facts.memory_total is not None:
            evidence.append(f"memory: {facts.memory_total / 1e9:.1f} GB")
        elif facts.clock_hz is not None:
            evidence.append(f"clock: {facts.clock_hz / 1e9:.2f} GHz")
    if facts.l4t:
        evidence.append(
            f"L4T {facts.l4t}"
            + (f": JetPack {jetpack_release.name}" if jetpack_release else ", which is not known here")
        )
    return Identification(
        profile, tuple(evidence), tuple(_difference_texts(profile, facts, jetpack_release)), jetpack_release
    )


def _generic_profile(facts: BoardFacts, folders: Sequence[Path]) -> HardwareProfile:
    name = f"generic-{facts.machine.replace('_', '-')}"
    if name not in profile_store.profile_names(folders):
        raise ProfileError(
            f"no hardware profile fits a {facts.machine} board",
            got=repr(facts.model),
            hint="Write one (docs/add-a-board.md) and name it.",
        )
    return profile_store.find_profile(name, folders)


def _profile_distance(profile: HardwareProfile, facts: BoardFacts) -> tuple[float, float]:
    """How far memory and clock are from the profile's, as magnitudes of ratios; 0 where they aren't known or fit."""
    distances = []
    for measured, promised, slack in (
        (facts.memory_total, profile.memory.total_bytes, _MEMORY_SLACK),
        (facts.clock_hz, profile.cpu.clock_hz, _CLOCK_SLACK),
    ):
        distance = abs(math.log(measured / promised)) if measured else 0.0
        distances.append(0.0 if distance <= slack else distance)
    return distances[0], distances[1]


def _difference_texts(profile: HardwareProfile, facts: BoardFacts, release: JetPack | None) -> list[str]:
    differences = []
    memory, clock = _profile_distance(profile, facts)
    if memory and facts.memory_total and profile.identify:
        differences.append(
            f"it has {facts.memory_total / 1e9:.1f} GB of memory, not {profile.memory.total_bytes / 1e9:.1f}"
        )
    if clock and facts.clock_hz and profile.identify:
        differences.append(
            f"its processor runs at {facts.clock_hz / 1e9:.2f} GHz, not {profile.cpu.clock_hz / 1e9:.2f}"
        )
    if release is not None:
        promised = profile.software.tensorrt
        if promised is not None and promised != release.tensorrt:
            differences.append(f"JetPack {release.name} has TensorRT {release.tensorrt}, not {promised}")
        if not release.has_supported_python and profile.support == "full":
            differences.append(
                f"JetPack {release.name} has Python {release.python}, and the runtime needs 3.10: flash a newer one"
            )
    return differences

"""Chooses a board's execution tier: the processor, CUDA or TensorRT, with the plan for TensorRT's engines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedprune.core.disk import storage_errors
from fedprune.planning.profile import TIERS, HardwareProfile
from fedprune.runtime.tensorrt_config import EnginePlan
from fedprune_device.engines.engine_selector import EngineSelector

ENGINES = "engines"  # the folder of engines in a state directory
CPU, _, TENSORRT = TIERS


@dataclass(frozen=True)
class BoardTier:
    """A board's execution tier (one of `TIERS`; the processor where the tier doesn't work), and the plan for its
    engines."""

    name: str
    plan: EnginePlan

    @property
    def cuda(self) -> bool:
        return self.name != CPU

    def selector(self, state: Path) -> EngineSelector | None:
        """The selector that keeps an engine for predictions; None unless the tier is TensorRT."""
        return None if self.name != TENSORRT else EngineSelector(state / ENGINES, self.plan)


def board_tier(tier: str | None, plan: Path | None, profile: HardwareProfile | None) -> BoardTier:
    name = tier or (CPU if profile is None else profile.software.tier)
    return BoardTier(name, EnginePlan() if plan is None else read_engine_plan(plan))


def read_engine_plan(path: Path) -> EnginePlan:
    with storage_errors(f"can't read {path}"):
        raw = path.read_bytes()
    return EnginePlan.from_json(raw, str(path))

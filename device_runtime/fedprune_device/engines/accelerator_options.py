"""What a board computes with: its processor, CUDA, or TensorRT for predictions and CUDA for the rest."""

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
class Accelerator:
    """What a board computes with, one of `TIERS`, as far as that works there, and how engines are built."""

    name: str
    plan: EnginePlan

    @property
    def cuda(self) -> bool:
        return self.name != CPU

    def selector(self, state: Path) -> EngineSelector | None:
        """What keeps an engine for predictions, if there is to be one."""
        if self.name != TENSORRT:
            return None
        return EngineSelector(state / ENGINES, self.plan)


def accelerator_of(tier: str | None, plan: Path | None, profile: HardwareProfile | None) -> Accelerator:
    name = tier or (CPU if profile is None else profile.software.tier)
    return Accelerator(name, EnginePlan() if plan is None else read_plan(plan))


def read_plan(path: Path) -> EnginePlan:
    with storage_errors(f"can't read {path}"):
        raw = path.read_bytes()
    return EnginePlan.from_json(raw, str(path))

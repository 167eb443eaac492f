"""The tables of a hardware profile, figure by figure: what each is, its unit and its limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TIERS = ("onnxruntime-cpu", "onnxruntime-cuda", "tensorrt")
"""What a board computes with, as far as it works there: with the first all on its processor, with the second all on its
GPU, with the third predictions in TensorRT engines and the rest on the GPU; where it doesn't, on the processor."""


def _figure(doc: str, unit: str, low: float, high: float, *, optional: bool = False) -> Any:
    meta = {"doc": doc, "unit": unit, "low": low, "high": high, "kind": "number"}
    return field(default=None, metadata=meta) if optional else field(metadata=meta)


def _text(doc: str, *, choices: tuple[str, ...] = (), optional: bool = False, kind: str = "text") -> Any:
    meta = {"doc": doc, "unit": "", "choices": choices, "kind": kind}
    return field(default=None, metadata=meta) if optional else field(metadata=meta)


@dataclass(frozen=True)
class Cpu:
    """The processor."""

    cores: int = _figure("Cores that Linux schedules on.", "cores", 1, 4096)
    clock_hz: int = _figure("Highest sustained clock.", "Hz", 10**7, 10**11)
    isa: tuple[str, ...] = _text("Instruction sets that kernels may use.", kind="texts")


@dataclass(frozen=True)
class Memory:
    """Main memory."""

    total_bytes: int = _figure("What Linux reports as MemTotal.", "bytes", 2**20, 2**50)
    bandwidth_bytes_s: float = _figure(
        "Sustained traffic of one large copy, read plus write.", "bytes/s", 10**6, 10**14
    )
    reserve_bytes: int = _figure("Kept for the system and the application.", "bytes", 0, 2**50)
    training_share: float = _figure("Share of the rest that training may use.", "0 to 1", 0.01, 1)


@dataclass(frozen=True)
class Compute:
    """Speed of the unit that trains."""

    peak_flops: float = _figure("Peak float32 rate of all cores.", "FLOP/s", 10**6, 10**16)
    efficiency: float = _figure("Share of the peak that the probe's training step reaches.", "0 to 1", 0.0001, 1)


@dataclass(frozen=True)
class Accelerator:
    """A graphics or neural unit beside the processor; it serves predictions."""

    kind: str = _text("Programming interface.", choices=("cuda", "other"))
    shared_memory: bool = _text("Whether it shares the main memory.", kind="flag")
    sm: str | None = _text("CUDA compute capability, such as 8.7.", optional=True)
    peak_flops: float | None = _figure("Peak float32 rate.", "FLOP/s", 10**6, 10**17, optional=True)


@dataclass(frozen=True)
class Link:
    """The way to the server."""

    up_bytes_s: float = _figure("Rate from board to server.", "bytes/s", 1, 10**12)
    down_bytes_s: float = _figure("Rate from server to board.", "bytes/s", 1, 10**12)
    latency_s: float = _figure("Round trip to the server.", "s", 0, 3600)
    bytes_per_round: int = _figure("Bytes, down plus up, that one round may use.", "bytes", 1, 2**50)


@dataclass(frozen=True)
class Power:
    """Power at the wall."""

    idle_w: float | None = _figure("Idle.", "W", 0, 10**5, optional=True)
    load_w: float | None = _figure("All cores busy.", "W", 0, 10**5, optional=True)


@dataclass(frozen=True)
class Storage:
    """Room on the board's disk or card."""

    budget_bytes: int = _figure("Bytes that fedprune may take.", "bytes", 2**20, 2**50)


@dataclass(frozen=True)
class Software:
    """What the board runs."""

    python: str = _text("Python of its system.")
    onnxruntime: str = _text("Newest onnxruntime that it loads.")
    tier: str = _text("What computes.", choices=TIERS)
    tensorrt: str | None = _text("TensorRT of its system.", optional=True)


SECTIONS: dict[str, tuple[type, bool]] = {
    "cpu": (Cpu, True),
    "memory": (Memory, True),
    "compute": (Compute, True),
    "accelerator": (Accelerator, False),
    "link": (Link, True),
    "power": (Power, False),
    "storage": (Storage, True),
    "software": (Software, True),
}
"""Tables of a profile: their class and whether they are required."""

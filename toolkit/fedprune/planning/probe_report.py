"""A board's measurements of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from fedprune.core.errors import ProfileError
from fedprune.core.settings import bounded, check_fields
from fedprune.planning.latency_model import LatencyTable

_MAX_TEXT = 200

CPU, CUDA = UNITS = ("cpu", "cuda")
"""Units that compute, by the names that `Session.provider` has for them."""


@dataclass(frozen=True)
class ProbeReport:
    """Measurements of a board, made before it is planned for.

    Times are those of the unit that trains there: where a board's tier is a GPU that works, its GPU.

    Attributes:
        cores: Cores that the process may run on.
        memory_total: MemTotal, in bytes.
        memory_available: MemAvailable when the probe began, in bytes.
        seconds: How long the probe took.
        onnxruntime: Its version; empty where it can't be loaded.
        board: The device tree's model; empty if it does not exist.
        clock_hz: Highest clock of the processor, None where the system doesn't say.
        train_rate: Float32 rate of a reference training step, in FLOP/s as `planning.costs` counts them; None if not
            measured.
        infer_rate: The same for the forward pass.
        temperature_c: The processor's temperature at the end, in degrees Celsius.
        throttled: Whether the board slowed itself down (heat, low voltage) during the probe.
        latency: What kinds of layers take there; None if not measured.
        process_bytes: Memory of the board's process before it trains, without its samples; None if not measured.
        unit: What the rates and `latency` were measured on, one of `UNITS`.
    """

    cores: int = bounded(MISSING, 1, 4096)
    memory_total: int = bounded(MISSING, 2**20, 2**50)
    memory_available: int = bounded(MISSING, 0, 2**50)
    seconds: float = bounded(MISSING, 0, 1e6)
    onnxruntime: str = ""
    board: str = ""
    clock_hz: int | None = bounded(None, 10**6, 10**11)
    train_rate: float | None = bounded(None, 1, 1e17)
    infer_rate: float | None = bounded(None, 1, 1e17)
    temperature_c: float | None = bounded(None, -80, 200)
    throttled: bool = False
    latency: LatencyTable | None = None
    process_bytes: int | None = bounded(None, 2**20, 2**40)
    unit: str = CPU

    def __post_init__(self) -> None:
        check_fields(self, ("probe",), ProfileError)
        for name in ("onnxruntime", "board"):
            value = getattr(self, name)
            if not isinstance(value, str) or len(value) > _MAX_TEXT:
                raise ProfileError(
                    f"probe report: {name}", expected=f"a text of up to {_MAX_TEXT} characters", got=repr(value)[:80]
                )
        if self.latency is not None and not isinstance(self.latency, LatencyTable):
            raise ProfileError("probe report: latency", expected="a latency table", got=type(self.latency).__name__)
        if self.unit not in UNITS:
            raise ProfileError("probe report: unit", expected=" or ".join(UNITS), got=repr(self.unit)[:80])
        if self.memory_available > self.memory_total:
            raise ProfileError(
                "probe report: memory_available",
                expected=f"at most memory_total ({self.memory_total})",
                got=self.memory_available,
            )

    def to_dict(self) -> dict[str, Any]:
        body = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**body, "latency": None if self.latency is None else self.latency.to_dict()}

    @classmethod
    def from_dict(cls, body: object) -> ProbeReport:
        """Read and check; unknown keys are ignored. Raises `ProfileError` if a measurement is missing, of
        the wrong type or out of range."""
        if not isinstance(body, Mapping):
            raise ProfileError("probe report", expected="a table of measurements", got=type(body).__name__)
        for name in ("cores", "memory_total", "memory_available", "seconds"):
            if name not in body:
                raise ProfileError(f"probe report: {name} is missing")
        values = {f.name: body[f.name] for f in fields(cls) if f.name in body}
        if values.get("latency") is not None:
            values["latency"] = LatencyTable.from_dict(values["latency"])
        return cls(**values)

"""A board's measurements of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from fedprune.core.errors import ProfileError
from fedprune.core.records import convert_record, number_range, printable_text, word_of
from fedprune.planning.latency_model import LatencyTable

_MAX_TEXT_LENGTH = 200
MAX_REASON_LENGTH = 500

# Units that compute, by the names that `Session.provider` has for them.
CPU, CUDA = UNITS = ("cpu", "cuda")

Rate = Annotated[float, number_range(1, 1e17)]


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
        cpu_reason: Why that is the processor although the board's tier is a GPU; empty otherwise.
    """

    cores: Annotated[int, number_range(1, 4096)]
    memory_total: Annotated[int, number_range(2**20, 2**50)]
    memory_available: Annotated[int, number_range(0, 2**50)]
    seconds: Annotated[float, number_range(0, 1e6)]
    onnxruntime: Annotated[str, printable_text(_MAX_TEXT_LENGTH)] = ""
    board: Annotated[str, printable_text(_MAX_TEXT_LENGTH)] = ""
    clock_hz: Annotated[int, number_range(10**6, 10**11)] | None = None
    train_rate: Rate | None = None
    infer_rate: Rate | None = None
    temperature_c: Annotated[float, number_range(-80, 200)] | None = None
    throttled: bool = False
    latency: LatencyTable | None = None
    process_bytes: Annotated[int, number_range(2**20, 2**40)] | None = None
    unit: Annotated[str, word_of(UNITS)] = CPU
    cpu_reason: Annotated[str, printable_text(MAX_REASON_LENGTH)] = ""

    def __post_init__(self) -> None:
        if self.memory_available > self.memory_total:
            raise ProfileError(
                "probe report: memory_available",
                expected=f"at most memory_total ({self.memory_total})",
                got=self.memory_available,
            )

    def to_dict(self) -> dict[str, Any]:
        return {**vars(replace(self)), "latency": None if self.latency is None else self.latency.to_dict()}

    @classmethod
    def from_dict(cls, body: object) -> ProbeReport:
        """Read and check; unknown keys are ignored. Raises `ProfileError` if a measurement is missing, of
        the wrong type or out of range."""
        if isinstance(body, Mapping) and body.get("latency") is not None:
            body = {**body, "latency": LatencyTable.from_dict(body["latency"])}
        return convert_record(cls, body, "probe report", ProfileError)

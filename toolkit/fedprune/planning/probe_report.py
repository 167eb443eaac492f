"""A board's measurements of itself, and the times of each form of a convolution, by which the compiler chooses forms.

The probe times small graphs, one per form and shape. A layer is compared with the shape that is nearest to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fedprune.core import validation
from fedprune.core.errors import ProfileError
from fedprune.core.validation import is_whole
from fedprune.planning.kernel_workload import BLOCKS
from fedprune.planning.latency_model import LatencyTable

NAMES = (
    *("forward.plain", "forward.blocks", "depthwise.plain", "depthwise.blocks"),
    *("input.flipped", "input.transposed", "input.blocks"),
    *("kernel.taps", "kernel.products", "kernel.columns", "kernel.convolution", "kernel.blocks"),
    "convert.plain",
)
"""What is timed: a part of a layer, and its form. `blocks` has its values in blocks before and after; `convert.plain`
is the way of a layer's input from blocks to the plain layout."""

MOST_SHAPES = 64
"""Of a table that comes from outside."""

_FAR = 2.5
"""Distance, in doublings of a size, from which a shape tells nothing about another."""

_MAX_SIZE, _MAX_PLACES, _MAX_WINDOW = 2**16, 2**24, 64
_MAX_SECONDS = 1e3


@dataclass(frozen=True)
class Shape:
    """A convolution's shape: elements of its window along one side, channels (1 input of a depthwise one), and places
    of its map."""

    kernel: int
    stride: int
    inputs: int
    outputs: int
    places: int
    depthwise: bool = False

    def __post_init__(self) -> None:
        limits = (_MAX_WINDOW, _MAX_WINDOW, _MAX_SIZE, _MAX_SIZE, _MAX_PLACES)
        sizes = (self.kernel, self.stride, self.inputs, self.outputs, self.places)
        for value, most in zip(sizes, limits, strict=True):
            validation.whole("form times: a size", value, 1, most, error=ProfileError)

    def distance(self, other: Shape) -> float:
        """How far another shape is, in doublings; infinite where window or kind differ."""
        if (self.kernel, self.stride, self.depthwise) != (other.kernel, other.stride, other.depthwise):
            return math.inf
        pairs = ((self.inputs, other.inputs), (self.outputs, other.outputs), (self.places, other.places))
        return sum(abs(math.log2(a / b)) for a, b in pairs)


@dataclass(frozen=True)
class FormTimes:
    """A board's seconds per sample by shape and name (`NAMES`); a form that was not measured is missing. Raises
    `ProfileError` if there are too many shapes, or something is no time."""

    rows: tuple[tuple[Shape, tuple[tuple[str, float], ...]], ...]

    def __post_init__(self) -> None:
        if len(self.rows) > MOST_SHAPES:
            raise ProfileError("form times: shapes", expected=f"up to {MOST_SHAPES}", got=len(self.rows))
        for _, times in self.rows:
            if len({name for name, _ in times}) < len(times):
                raise ProfileError("form times: a form comes twice")
            for name, seconds in times:
                if name not in NAMES:
                    raise ProfileError("form times: a form", expected=", ".join(NAMES), got=repr(name)[:80])
                if not 0 < seconds <= _MAX_SECONDS:  # false for what is not a number
                    raise ProfileError(
                        f"form times: {name}",
                        expected=f"seconds above 0, up to {_MAX_SECONDS:g}",
                        got=repr(seconds)[:80],
                    )

    def near(self, shape: Shape) -> Mapping[str, float]:
        """Times at the measured shape that is nearest; empty where none is near enough."""
        found = min(self.rows, key=lambda row: shape.distance(row[0]), default=None)
        return dict(found[1]) if found is not None and shape.distance(found[0]) <= _FAR else {}

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": [
                {
                    "shape": [s.kernel, s.stride, s.inputs, s.outputs, s.places, int(s.depthwise)],
                    "seconds": dict(times),
                }
                for s, times in self.rows
            ]
        }

    @classmethod
    def from_dict(cls, body: object) -> FormTimes:
        """Read and check; forms that only newer probes know are ignored. Raises `ProfileError` if it is not what
        `to_dict` writes."""
        try:
            if not isinstance(body, Mapping) or not isinstance(body["rows"], list):
                raise TypeError("no rows")
            if len(body["rows"]) > MOST_SHAPES:
                raise ProfileError("form times: shapes", expected=f"up to {MOST_SHAPES}", got=len(body["rows"]))
            return cls(tuple(map(_row, body["rows"])))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ProfileError(f"these are no form times ({type(error).__name__}: {str(error)[:80]})") from error


def _row(body: Any) -> tuple[Shape, tuple[tuple[str, float], ...]]:
    if not isinstance(body, Mapping) or not isinstance(body["seconds"], Mapping):
        raise TypeError(f"a row is a {type(body).__name__}")
    kernel, stride, inputs, outputs, places, depthwise = body["shape"]
    if depthwise not in (0, 1):
        raise ValueError("whether a shape is depthwise")
    times = []
    for name, seconds in body["seconds"].items():
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            raise TypeError(f"seconds are a {type(seconds).__name__}")
        if name in NAMES:
            times.append((str(name), float(seconds)))
    return Shape(kernel, stride, inputs, outputs, places, bool(depthwise)), tuple(times)


_LIMITS: dict[str, tuple[bool, float, float, bool]] = {
    # name: whole number, lowest, highest, may be absent
    "cores": (True, 1, 4096, False),
    "memory_total": (True, 2**20, 2**50, False),
    "memory_available": (True, 0, 2**50, False),
    "clock_hz": (True, 10**6, 10**11, True),
    "train_rate": (False, 1.0, 1e17, True),
    "infer_rate": (False, 1.0, 1e17, True),
    "seconds": (False, 0.0, 1e6, False),
    "temperature_c": (False, -80.0, 200.0, True),
    "process_bytes": (True, 2**20, 2**40, True),
}
_MAX_TEXT = 200


@dataclass(frozen=True)
class ProbeReport:
    """Measurements of a board, made before it is planned for.

    Attributes:
        cores: Cores that the process may run on.
        memory_total: MemTotal, in bytes.
        memory_available: MemAvailable when the probe began, in bytes.
        seconds: How long the probe took.
        onnxruntime: Its version; empty where it can't be loaded.
        board: The device tree's model; empty where there is none.
        clock_hz: Highest clock of the processor, None where the system doesn't say.
        train_rate: Float32 rate of a reference training step, in FLOP/s as `planning.costs` counts them; None if not
            measured.
        infer_rate: The same for the forward pass.
        temperature_c: The processor's temperature at the end, in degrees Celsius.
        throttled: Whether the board slowed itself down (heat, low voltage) during the probe.
        latency: What kinds of layers take there; None if not measured.
        block: Channels that its convolutions compute at once in training graphs made for it
            (`fedprune.runtime.blocks`); 0 where those are to be made of standard operators alone.
        forms: What the forms of a convolution take there in a training step; None if not measured.
        process_bytes: Memory of the board's process before it trains, without its samples; None if not measured.
    """

    cores: int
    memory_total: int
    memory_available: int
    seconds: float
    onnxruntime: str = ""
    board: str = ""
    clock_hz: int | None = None
    train_rate: float | None = None
    infer_rate: float | None = None
    temperature_c: float | None = None
    throttled: bool = False
    latency: LatencyTable | None = None
    block: int = 0
    forms: FormTimes | None = None
    process_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, (whole, low, high, optional) in _LIMITS.items():
            value = getattr(self, name)
            if value is None and optional:
                continue
            if whole:
                validation.whole(f"probe report: {name}", value, int(low), int(high), error=ProfileError)
            else:
                validation.number(f"probe report: {name}", value, low, high, error=ProfileError)
        for name in ("onnxruntime", "board"):
            value = getattr(self, name)
            if not isinstance(value, str) or len(value) > _MAX_TEXT:
                raise ProfileError(
                    f"probe report: {name}", expected=f"a text of up to {_MAX_TEXT} characters", got=repr(value)[:80]
                )
        if self.latency is not None and not isinstance(self.latency, LatencyTable):
            raise ProfileError("probe report: latency", expected="a latency table", got=type(self.latency).__name__)
        known = (0, *BLOCKS[1:])
        if not is_whole(self.block) or self.block not in known:
            raise ProfileError(
                "probe report: block", expected=f"one of {', '.join(map(str, known))}", got=repr(self.block)[:80]
            )
        if self.forms is not None and not isinstance(self.forms, FormTimes):
            raise ProfileError("probe report: forms", expected="form times", got=type(self.forms).__name__)
        validation.truth("probe report: throttled", self.throttled, error=ProfileError)
        if self.memory_available > self.memory_total:
            raise ProfileError(
                "probe report: memory_available",
                expected=f"at most memory_total ({self.memory_total})",
                got=self.memory_available,
            )

    def to_dict(self) -> dict[str, Any]:
        body = {f.name: getattr(self, f.name) for f in fields(self)}
        tables = {"latency": self.latency, "forms": self.forms}
        return {**body, **{name: None if table is None else table.to_dict() for name, table in tables.items()}}

    @classmethod
    def from_dict(cls, body: object) -> ProbeReport:
        """Read and check; keys of newer probes are ignored. Raises `ProfileError` if a measurement is missing, of
        the wrong type or out of range."""
        if not isinstance(body, Mapping):
            raise ProfileError("probe report", expected="a table of measurements", got=type(body).__name__)
        for name in ("cores", "memory_total", "memory_available", "seconds"):
            if name not in body:
                raise ProfileError(f"probe report: {name} is missing")
        values = {f.name: body[f.name] for f in fields(cls) if f.name in body}
        if values.get("latency") is not None:
            values["latency"] = LatencyTable.from_dict(values["latency"])
        if values.get("forms") is not None:
            values["forms"] = FormTimes.from_dict(values["forms"])
        return cls(**values)

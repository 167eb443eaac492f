"""What each form of a convolution takes on a board, measured at a few shapes: what the compiler chooses forms by.

The probe times small graphs, one per form and shape. A layer is compared with the shape that is nearest to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedprune.core import validation
from fedprune.core.errors import ProfileError

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
"""Distance, in doublings of a size, from which on a shape says nothing of another."""

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
        """As plain JSON types."""
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

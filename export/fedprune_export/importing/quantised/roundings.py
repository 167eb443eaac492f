"""Places where a quantised file rounds numbers, and what else it does to them there."""

from __future__ import annotations

from dataclasses import dataclass

from fedprune_export.importing.quantised.numbers import Quantisation

# How far the outputs of an operator that rounds inside may be from those of its float form, as a share of the largest:
# a recurrent layer rounds its state at every step, to 8 bits.
INNER_SHARE = 0.1

# How far the number that goes into a rounding may be from what the file has behind it, in steps: rounding itself moves
# it by half a step. An operator on integers rounds its intermediate results, too.
ROUNDING_STEPS, OPERATOR_STEPS = 0.5, 1.5


@dataclass(frozen=True)
class Rounding:
    """A place where the file rounds a number and the float model doesn't.

    Attributes:
        value: The number, in the float model.
        passed: The same number behind the rounding, which the float model reads instead of `integers`.
        integers: What the file has there; `quantisation` says what they stand for. Without one they are the file's own
            numbers, behind an operator that rounds inside.
        bounds: The least and greatest integer; None if the range follows from the numbers.
        steps: How far value and integers may be apart, in steps; without a quantisation, as a share of the largest.
    """

    value: str
    passed: str
    integers: str
    quantisation: Quantisation | None
    bounds: tuple[int, int] | None
    steps: float


@dataclass(frozen=True)
class Clipping:
    """A Relu, or a Clip up to a number, that a rounding did, and what made its input."""

    maker: str
    end: float | None

"""Random inputs of training steps: masks of dropouts and noise, which a graph takes as inputs and the trainer draws.

A mask holds 0 where a number is dropped and mostly 1 / (1 − ratio) elsewhere. Only the key of the random generator
decides what is drawn, so that a board and its simulation draw the same bits. Evaluation draws nothing: it feeds ones as
masks, and means as noise, so that the same sample always gives the same prediction.

The shape is that of the value that is multiplied or drawn, with 1 along axes on which numbers are dropped together
(channels, whole samples). Widths in it are names, as in all shapes of a training graph: polynomials of the batch and
the widths of channel groups, such as `g0*4+16`. Their values follow from the shapes of the weights that are fed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import TrainingError, value_text
from fedprune.core.rng import keyed_generator
from fedprune.core.validation import is_number
from fedprune.model.step_contract import RANDOM_METADATA, is_random_input

Array = npt.NDArray[Any]
Shape = Sequence[int | str | None]

BATCH = "N"  # the name of the batch in a training graph's shapes

MASK, NORMAL, UNIFORM = "mask", "normal", "uniform"

_INTEGER = re.compile("-?[0-9]{1,10}")


@dataclass(frozen=True)
class Draw:
    """A distribution of random numbers.

    Attributes:
        kind: `MASK`, `NORMAL` or `UNIFORM`.
        first: The share of a mask's numbers that are 0; the mean; or the lower bound.
        second: The other numbers of a mask; the standard deviation; or the upper bound.
    """

    kind: str
    first: float
    second: float

    @classmethod
    def dropout(cls, ratio: float) -> Draw:
        """The mask of a dropout, whose mean is 1."""
        return cls(MASK, ratio, 1 / (1 - ratio) if ratio < 1 else 0.0)

    @classmethod
    def parse(cls, value: Any) -> Draw | None:
        """A draw from JSON: the ratio of a dropout, or kind and two numbers. None if it is something else."""
        if is_number(value, 0, 1):
            return cls.dropout(float(value))
        if not isinstance(value, list) or len(value) != 3 or value[0] not in (MASK, NORMAL, UNIFORM):
            return None
        kind, first, second = value
        bounds = (0, 1) if kind == MASK else (-_MAX_NUMBER, _MAX_NUMBER)
        lowest = {MASK: -_MAX_NUMBER, NORMAL: 0.0, UNIFORM: first}[kind]
        if not is_number(first, *bounds) or not is_number(second, lowest, _MAX_NUMBER):
            return None
        return cls(kind, float(first), float(second))

    def to_json(self) -> float | list[Any]:
        """As `parse` reads it."""
        return self.first if self == Draw.dropout(self.first) else [self.kind, self.first, self.second]

    @property
    def mean(self) -> float:
        """What evaluation takes: 1 for a mask, so that it changes nothing."""
        return {MASK: 1.0, NORMAL: self.first, UNIFORM: (self.first + self.second) / 2}[self.kind]

    def sample(self, generator: np.random.Generator, shape: Sequence[int]) -> Array:
        """Random numbers [*shape] in float32."""
        numbers: Array
        if self.kind == NORMAL:
            # In float64, because libraries of other processors round logarithms and powers in the last bit, which is
            # lost in float32.
            numbers = (self.first + self.second * generator.standard_normal(shape)).astype(np.float32)
        elif self.kind == UNIFORM:
            low, width = np.float32(self.first), np.float32(self.second - self.first)
            numbers = low + width * generator.random(shape, np.float32)
        else:
            # Sixteen random bits decide on a number: the share is then right to 1/131,072, and a board draws four
            # numbers in the time of one.
            words = generator.bit_generator.random_raw(-(-math.prod(shape) // _NUMBERS_PER_WORD))
            bits = words.astype("<u8", copy=False).view("<u2")[: math.prod(shape)].reshape(shape)
            numbers = np.multiply(bits >= round(self.first * 2**16), np.float32(self.second), dtype=np.float32)
        return numbers


_NUMBERS_PER_WORD = 4  # of 16 bits each, in a word of the generator

_MAX_NUMBER = 1e30  # far from the bounds of float32, so that draws stay finite


@dataclass(frozen=True)
class RandomInputs:
    """The random inputs of a training graph: how each is drawn, and the shapes of all inputs of the graph."""

    draws: Mapping[str, Draw]
    shapes: Mapping[str, Shape]

    @classmethod
    def of(cls, inputs: Mapping[str, tuple[str, Shape]], metadata: Mapping[str, str]) -> RandomInputs:
        """Those of a graph with these inputs, as a session gives them. Raises `TrainingError` if the metadata doesn't
        say how each is drawn."""
        names = [name for name in inputs if is_random_input(name)]
        try:
            texts = json.loads(metadata.get(RANDOM_METADATA, "{}"))
        except (ValueError, RecursionError):
            texts = None
        parsed = {name: Draw.parse(texts.get(name)) if isinstance(texts, dict) else None for name in names}
        draws = {name: draw for name, draw in parsed.items() if draw is not None}
        if len(draws) != len(names) or not isinstance(texts, dict):
            raise TrainingError(
                f"metadata {RANDOM_METADATA}",
                expected=f"a ratio from 0 to 1, or a distribution, for {names}",
                got=value_text(metadata.get(RANDOM_METADATA)),
            )
        return cls(draws, {name: shape for name, (_, shape) in inputs.items()})

    def draw(self, arrays: Mapping[str, Array], samples: int, seed: int, *key: object) -> dict[str, Array]:
        """Random numbers for a batch, by a generator that `seed`, `key` and the input's name decide. The shapes of
        `arrays`, the other inputs by name, give the widths."""
        return {
            name: self.draws[name].sample(keyed_generator(seed, *key, name), shape)
            for name, shape in self._input_shapes(arrays, samples).items()
        }

    def means(self, arrays: Mapping[str, Array], samples: int) -> dict[str, Array]:
        """What evaluation feeds: masks that drop nothing, and the means of noise."""
        return {
            name: np.full(shape, self.draws[name].mean, np.float32)
            for name, shape in self._input_shapes(arrays, samples).items()
        }

    def _input_shapes(self, arrays: Mapping[str, Array], samples: int) -> dict[str, tuple[int, ...]]:
        """The shapes for a batch, by the graph's input shapes and what is fed to it."""
        if not self.draws:
            return {}
        fed_shapes = {name: a.shape for name, a in arrays.items() if name in self.shapes and "::" not in name}
        sizes = solve_sizes({name: (self.shapes[name], shape) for name, shape in fed_shapes.items()})
        return {name: shape_in_numbers(self.shapes[name], sizes | {BATCH: samples}) for name in self.draws}


def shape_in_numbers(shape: Shape, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A shape of a training graph in numbers. Raises `TrainingError` if it has a name that `sizes` doesn't explain, or
    is negative."""
    values = [d if isinstance(d, int) else _sum_value(_terms(str(d)), sizes) for d in shape]
    numbers = tuple(v for v in values if v is not None and v >= 0)
    if len(numbers) < len(values):
        raise TrainingError(
            "a size in the training graph", expected=f"made of {', '.join(sizes)}", got=value_text(shape)
        )
    return numbers


def solve_sizes(pairs: Mapping[str, tuple[Shape, Sequence[int]]]) -> dict[str, int]:
    """Solve for the names in shapes, from arrays of these shapes, as far as the equations can be solved one by one.
    Each dimension is linear in every name: with all others known, its values at 0 and 1 give the name's size."""
    equations = [(_terms(d), n) for shape, sizes in pairs.values() for d, n in zip(shape, sizes, strict=False)
                  if isinstance(d, str) and d]  # fmt: skip
    solved: dict[str, int] = {}
    while True:
        count_before = len(solved)
        for terms, size in equations:
            unknown = [f for factors, _ in terms for f in factors if f not in solved]
            if len(unknown) != 1:
                continue
            offset, at_one = (_sum_value(terms, {**solved, unknown[0]: n}) or 0 for n in (0, 1))
            if at_one != offset:
                solved[unknown[0]] = (size - offset) // (at_one - offset)
        if len(solved) == count_before:
            return solved


Terms = list[tuple[list[str], int]]  # names whose product, times a number, is a term of a sum


def _terms(text: str) -> Terms:
    """The terms of a sum: `g0*4+16` gives [(["g0"], 4), ([], 16)]."""
    terms: Terms = []
    for term in text.split("+"):
        factors = term.split("*")
        numbers = [int(f) for f in factors if _INTEGER.fullmatch(f)]
        terms.append(([f for f in factors if not _INTEGER.fullmatch(f)], math.prod(numbers)))
    return terms


def _sum_value(terms: Terms, sizes: Mapping[str, int]) -> int | None:
    if any(f not in sizes for factors, _ in terms for f in factors):
        return None
    return sum(times * math.prod(sizes[f] for f in factors) for factors, times in terms)

"""Dropout in training steps: masks that a graph takes as inputs and the trainer draws.

A mask holds 0 where a number is dropped and 1 / (1 − ratio) elsewhere. Only the key of the random generator decides
which numbers are dropped, so that a board and its simulation drop the same ones. Evaluation feeds ones.

A mask's shape is that of the value that it multiplies, with 1 along axes on which numbers are dropped together
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
from fedprune.model.step_contract import DROPOUT_METADATA, is_dropout_mask

Array = npt.NDArray[Any]
Shape = Sequence[int | str | None]

BATCH = "N"  # the name of the batch in a training graph's shapes

_INTEGER = re.compile("-?[0-9]{1,10}")


@dataclass(frozen=True)
class DropoutMasks:
    """The masks that a training graph takes: the share of numbers that each mask drops, and the shapes of all inputs of
    the graph."""

    ratios: Mapping[str, float]
    shapes: Mapping[str, Shape]

    @classmethod
    def of(cls, inputs: Mapping[str, tuple[str, Shape]], metadata: Mapping[str, str]) -> DropoutMasks:
        """The masks of a graph with these inputs, as a session gives them. Raises `TrainingError` if the metadata
        doesn't give the ratio of each."""
        names = [name for name in inputs if is_dropout_mask(name)]
        try:
            ratios = json.loads(metadata.get(DROPOUT_METADATA, "{}"))
        except (ValueError, RecursionError):
            ratios = None
        if not isinstance(ratios, dict) or not all(is_number(ratios.get(name), 0, 1) for name in names):
            raise TrainingError(
                f"metadata {DROPOUT_METADATA}",
                expected=f"a ratio from 0 to 1 for {names}",
                got=value_text(metadata.get(DROPOUT_METADATA)),
            )
        return cls({name: float(ratios[name]) for name in names}, {name: shape for name, (_, shape) in inputs.items()})

    def draw(self, arrays: Mapping[str, Array], samples: int, seed: int, *key: object) -> dict[str, Array]:
        """Masks for a batch, by a generator that `seed`, `key` and the mask's name decide. The shapes of `arrays`, the
        other inputs by name, give the widths."""
        masks: dict[str, Array] = {}
        for name, shape in self._mask_shapes(arrays, samples).items():
            ratio = self.ratios[name]
            is_kept = keyed_generator(seed, *key, name).random(shape, np.float32) >= ratio
            masks[name] = is_kept * np.float32(1 / (1 - ratio) if ratio < 1 else 0)
        return masks

    def ones(self, arrays: Mapping[str, Array], samples: int) -> dict[str, Array]:
        """Masks that drop nothing."""
        return {name: np.ones(shape, np.float32) for name, shape in self._mask_shapes(arrays, samples).items()}

    def _mask_shapes(self, arrays: Mapping[str, Array], samples: int) -> dict[str, tuple[int, ...]]:
        return mask_shapes(self.shapes, arrays, samples) if self.ratios else {}


def mask_shapes(shapes: Mapping[str, Shape], arrays: Mapping[str, Array], samples: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a graph's masks for a batch, by the graph's input shapes and what is fed to it."""
    fed_shapes = {name: array.shape for name, array in arrays.items() if name in shapes and "::" not in name}
    sizes = solve_sizes({name: (shapes[name], shape) for name, shape in fed_shapes.items()}) | {BATCH: samples}
    return {name: shape_in_numbers(shape, sizes) for name, shape in shapes.items() if is_dropout_mask(name)}


def dropout_ones(
    inputs: Mapping[str, tuple[str, Shape]], arrays: Mapping[str, Array], samples: int
) -> dict[str, Array]:
    """Masks that drop nothing for a graph with these inputs, whatever its ratios are."""
    shapes = {name: shape for name, (_, shape) in inputs.items()}
    return {name: np.ones(shape, np.float32) for name, shape in mask_shapes(shapes, arrays, samples).items()}


def shape_in_numbers(shape: Shape, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A shape of a training graph in numbers. Raises `TrainingError` if it has a name that `sizes` doesn't explain."""
    values = [d if isinstance(d, int) else _sum_value(_terms(str(d)), sizes) for d in shape]
    if None in values:
        raise TrainingError(
            "a size in the training graph", expected=f"made of {', '.join(sizes)}", got=value_text(shape)
        )
    return tuple(v for v in values if v is not None)


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

"""A source of samples: a class of three methods, as an application writes one, and as all samples of a board are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fedprune_device.data.stored_array import Array, Rows

LABELS = "y"  # the name of the labels among a source's arrays


@dataclass(frozen=True)
class ArrayType:
    """The shape of one sample in an array, without the axis of samples, and the type of its numbers."""

    shape: tuple[int, ...] = ()
    dtype: str = "float32"


@dataclass(frozen=True)
class Schema:
    """The arrays of a source.

    Attributes:
        arrays: Their types by name: `x` for the inputs, or the name of each input of a model of several; `y` for the
            labels, if there are some; `lengths` ([] of int64), if inputs are padded to one length.
        class_names: The names of the classes, in the order of the numbers in `y`. A board that knows the fleet's names
            (`--class-names`, or those of a bundle) gives each label the fleet's number of its name.
    """

    arrays: Mapping[str, ArrayType]
    class_names: tuple[str, ...] = ()


@runtime_checkable
class DataSource(Protocol):
    """A source of samples: `--data package.module:Class`. The class may take `device` (the board's name) and `seed`.

    The board calls the methods from one thread, at the start and at the beginning of each round.
    """

    def schema(self) -> Schema:
        """The names, shapes and types of the arrays. They stay the same while the board runs."""

    def __len__(self) -> int:
        """Number of samples now. A sample keeps its index, so that one held out for testing is never trained on."""

    def read(self, indices: Rows) -> Mapping[str, Array]:
        """The samples at these indices, ascending whole numbers below the length: an array [n, ...] for each name."""

"""Random augmentations of training samples, as a recipe lists them: `flip`, `crop:4`, `specaugment:8:16@sound`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from fedprune.core import records, validation
from fedprune.core.errors import ConfigError, ModelError, value_text
from fedprune.core.records import item_count, number_range, word_of

# Augmentations of a recipe, each of which makes the training graph larger.
MAX_AUGMENTATIONS = 16

# Augmentations that move the values of a sample to other places.
GEOMETRIC = ("flip", "crop", "shift")

_FORMS = {
    "flip": "flip",
    "crop": "crop:PIXELS",
    "brightness": "brightness:SHARE",
    "contrast": "contrast:SHARE",
    "noise": "noise:DEVIATION",
    "shift": "shift:SHARE[:AXIS]",
    "specaugment": "specaugment:FREQUENCIES:STEPS",
}

_VALUE_RANGES: dict[str, tuple[tuple[float, float], ...]] = {
    "flip": (),
    "crop": ((1, 4096),),
    "brightness": ((0, 10),),
    "contrast": ((0, 1),),
    "noise": ((0, 1e6),),
    "shift": ((0, 1), (0, 7)),
    "specaugment": ((0, 65_536), (0, 65_536)),
}

_OPTIONAL_VALUES = {"shift": 1}
_WHOLE_VALUES = {("crop", 0), ("shift", 1), ("specaugment", 0), ("specaugment", 1)}
_MAX_ENTRY_LENGTH = 200
_MAX_RANK = 8


@dataclass(frozen=True)
class AugmentEntry:
    """One entry of `Recipe.augment`: its name, its numbers in their order, and the input of the model that it changes
    (empty if only one input fits)."""

    name: str
    values: tuple[float, ...] = ()
    input: str = ""

    @classmethod
    def parse(cls, text: object) -> AugmentEntry:
        """Read an entry. Raises `ConfigError` if it is unknown, or a number of it is missing or out of range."""
        setting = ("recipe", "augment")
        validation.check_text(setting, text, _MAX_ENTRY_LENGTH)
        entry, separator, input_name = str(text).partition("@")
        name, *numbers = entry.split(":")
        limits = _VALUE_RANGES.get(name)
        required = len(limits or ()) - _OPTIONAL_VALUES.get(name, 0)
        if limits is None or not required <= len(numbers) <= len(limits) or (separator and not input_name):
            expected = " or ".join(_FORMS.values()) if limits is None else _FORMS[name]
            raise ConfigError(
                value_text(text),
                path=setting,
                expected=f"{expected}, each with @INPUT where a model has several inputs",
            )
        values = []
        for position, (number, (low, high)) in enumerate(zip(numbers, limits, strict=False)):
            is_whole = (name, position) in _WHOLE_VALUES
            try:
                value = int(number) if is_whole else float(number)
            except ValueError:
                raise ConfigError(setting, expected=_FORMS[name], got=value_text(text)) from None
            if is_whole:
                validation.check_whole(setting, value, int(low), int(high))
            else:
                validation.check_number(setting, value, low, high, above=True)
            values.append(value)
        return cls(name, tuple(values), input_name)


def check_augmentations(value: object) -> tuple[str, ...]:
    """A recipe's list of augmentations as texts. Raises `ConfigError` if it is not one."""
    entries = tuple(
        validation.check_items(
            ("recipe", "augment"), value, MAX_AUGMENTATIONS, "augmentations, such as ['flip', 'crop:4']"
        )
    )
    for entry in entries:
        AugmentEntry.parse(entry)
    return entries


# Numbers of a sample. No real sample has more, and int32 can index them.
MAX_NUMBERS = 2**28


@dataclass(frozen=True)
class AugmentStep:
    """One augmentation of a training graph's samples.

    Attributes:
        begin: The position of its input in a row of several inputs; 0 for the only one.
        shape: One sample of that input.
        first: The position of its first random number among those of a sample.
        axes: Axes that it moves or masks, from the last one: -1, -2, -3.
    """

    name: Annotated[str, word_of(tuple(_FORMS))]
    values: tuple[float, ...]
    begin: Annotated[int, number_range(0, MAX_NUMBERS)]
    shape: Annotated[tuple[Annotated[int, number_range(1, MAX_NUMBERS)], ...], item_count(_MAX_RANK)]
    first: Annotated[int, number_range(0, MAX_NUMBERS)]
    axes: Annotated[tuple[Annotated[int, number_range(-_MAX_RANK, -1)], ...], item_count(2, 1)]

    @property
    def is_geometric(self) -> bool:
        """Whether it moves values, so that labels of positions have to move along."""
        return self.name in GEOMETRIC

    @property
    def size(self) -> int:
        """Numbers in one sample of its input."""
        return math.prod(self.shape)

    @property
    def random_count(self) -> int:
        """Random numbers that it needs for a sample."""
        return {"flip": 1, "crop": 2, "noise": 2 * -(-self.size // 2), "specaugment": 4}.get(self.name, 1)

    def check(self) -> None:
        """Raise `ModelError` unless its numbers suit each other."""
        count, limits = 2 if self.name in ("crop", "specaugment") else 1, _VALUE_RANGES[self.name]
        fits = len(limits) - _OPTIONAL_VALUES.get(self.name, 0) <= len(self.values) <= len(limits)
        fits = fits and all(low <= value <= high for value, (low, high) in zip(self.values, limits, strict=False))
        fits = fits and len(self.axes) == count and -min(self.axes) <= len(self.shape)
        if self.begin + self.size > MAX_NUMBERS or not fits:
            raise ModelError(
                "an augmentation of the training graph",
                expected=f"{_FORMS[self.name]} with {count} axes",
                got=f"{self.values}, axes {self.axes} of {self.shape}",
            )


@dataclass(frozen=True)
class AugmentPlan:
    """All augmentations of a training graph's samples. `fill` is the label of positions that move in from outside; None
    if labels are of whole samples and don't move."""

    steps: Annotated[tuple[AugmentStep, ...], item_count(MAX_AUGMENTATIONS)]
    fill: Annotated[int, number_range(-(2**31), 2**31 - 1)] | None

    @property
    def random_count(self) -> int:
        return max((step.first + step.random_count for step in self.steps), default=0)

    def to_json(self) -> str:
        return records.encode_record(self).decode()

    @classmethod
    def from_json(cls, text: str) -> AugmentPlan:
        """Read a plan. Raises `ModelError` if it isn't one."""
        plan = records.decode_record(cls, text.encode(), "augmentations of the training graph", ModelError)
        next_number = 0
        for step in plan.steps:
            step.check()
            if step.first != next_number:
                raise ModelError("the first random number of an augmentation", expected=next_number, got=step.first)
            next_number += step.random_count
        return plan

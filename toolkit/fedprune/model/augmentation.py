"""Random augmentations of training samples, as a recipe lists them: `flip`, `crop:4`, `specaugment:8:16@sound`."""

from __future__ import annotations

from dataclasses import dataclass

from fedprune.core import validation
from fedprune.core.errors import ConfigError, shown

MOST = 16
"""Augmentations of a recipe."""

GEOMETRIC = ("flip", "crop", "shift")
"""Augmentations that move the values of a sample to other places."""

_FORMS = {
    "flip": "flip",
    "crop": "crop:PIXELS",
    "brightness": "brightness:SHARE",
    "contrast": "contrast:SHARE",
    "noise": "noise:DEVIATION",
    "shift": "shift:SHARE[:AXIS]",
    "specaugment": "specaugment:FREQUENCIES:STEPS",
}

_LIMITS: dict[str, tuple[tuple[float, float], ...]] = {
    "flip": (),
    "crop": ((1, 4096),),
    "brightness": ((0, 10),),
    "contrast": ((0, 1),),
    "noise": ((0, 1e6),),
    "shift": ((0, 1), (0, 7)),
    "specaugment": ((0, 65_536), (0, 65_536)),
}

_OPTIONAL = {"shift": 1}
_WHOLE = {("crop", 0), ("shift", 1), ("specaugment", 0), ("specaugment", 1)}
_LONGEST = 200


@dataclass(frozen=True)
class Augmentation:
    """One entry of `Recipe.augment`.

    Attributes:
        values: Its numbers, in the order of the entry.
        input: The input of the model that it changes; empty for the only one that it fits.
    """

    name: str
    values: tuple[float, ...] = ()
    input: str = ""

    @classmethod
    def parse(cls, text: object) -> Augmentation:
        """Read an entry. Raises `ConfigError` if it is unknown, or a number of it is missing or out of range."""
        what = f"recipe: augment {shown(text)}"
        validation.text("recipe: an entry of augment", text, _LONGEST)
        given, at, of_input = str(text).partition("@")
        name, *numbers = given.split(":")
        limits = _LIMITS.get(name)
        least = len(limits or ()) - _OPTIONAL.get(name, 0)
        if limits is None or not least <= len(numbers) <= len(limits) or (at and not of_input):
            expected = " or ".join(_FORMS.values()) if limits is None else _FORMS[name]
            raise ConfigError(what, expected=f"{expected}, each with @INPUT where a model has several inputs")
        values = []
        for place, (number, (low, high)) in enumerate(zip(numbers, limits, strict=False)):
            whole = (name, place) in _WHOLE
            try:
                value = int(number) if whole else float(number)
            except ValueError:
                raise ConfigError(what, expected=_FORMS[name], got=shown(number)) from None
            if whole:
                validation.whole(what, value, int(low), int(high))
            else:
                validation.number(what, value, low, high, above=True)
            values.append(value)
        return cls(name, tuple(values), of_input)


def checked(value: object) -> tuple[str, ...]:
    """A recipe's list of augmentations as texts. Raises `ConfigError` if it is not one."""
    entries = tuple(validation.items("recipe: augment", value, MOST, "augmentations, such as ['flip', 'crop:4']"))
    for entry in entries:
        Augmentation.parse(entry)
    return entries

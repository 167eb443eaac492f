"""What a check of a state folder found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path


class Weight(str, Enum):
    """How bad something is."""

    WRONG = "wrong"
    NOTE = "note"


class Cure(str, Enum):
    """What a repair does about it."""

    NONE = "none"
    DELETE = "delete"
    SET_ASIDE = "set aside"
    FETCH = "fetch"


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be, or worth knowing.

    Attributes:
        weight: How bad it is.
        what: What it is, naming it.
        advice: What to do.
        cure: What a repair does.
        paths: The files that it is about.
        blob: Digest of the blob that it is about.
        keys: The objects of a bucket that it is about.
    """

    weight: Weight
    what: str
    advice: str = ""
    cure: Cure = Cure.NONE
    paths: tuple[Path, ...] = ()
    blob: str = ""
    keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.weight.value}: {self.what}{'. ' if self.advice else ''}{self.advice}"

"""Which codec an update travels in: what a job asks for, as far as a device knows it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from fedprune.core.errors import ConfigError, Subject, shown

PLAIN = "none"
"""No codec: a tensor file of float32."""

AUTO = "auto"
"""The strategy's own codec (`fedprune.strategies.strategy.Strategy.compression`)."""

Codecs = tuple[str | None, str | None]
"""Codecs of a device's updates, and of the weights that it is sent, as text; None for plain files."""

NO_CODECS: Codecs = (None, None)

_STEPS = {"int8": 127, "int4": 7, "ternary": 1, "top-k": 127}
"""For codecs whose differences are whole codes times a scale: the largest code."""

CODECS = ("zlib", "float16", *_STEPS)
"""The codecs of this version, for updates and weights; a device announces it in its birth."""

DOWN = tuple(n for n in CODECS if n != "top-k")
"""Those for the weights that devices are sent. With `top-k` devices would train on from what most of the model once
was, and an average of their weights would forget what has moved since."""

DEFAULT_SHARE = 0.05
LEAST_SHARE = 1e-5

_EXPECTED = f"{AUTO}, {PLAIN}, {', '.join(CODECS)} or top-k with a share, such as top-k:{DEFAULT_SHARE}"
_LONGEST = 40


@dataclass(frozen=True)
class Codec:
    """A codec with its setting. All are packed by zlib where that makes them smaller.

    Attributes:
        name: `zlib`: the very bits. `float16`: differences to the weights that were sent, with 11 significant bits.
            `int8`, `int4`, `ternary`: differences in 255, 15 or 3 steps per row or tensor. `top-k`: the largest
            differences alone, in 255 steps.
        share: With `top-k`, the share of each tensor's elements that travel.
    """

    name: str
    share: float = 0.0

    @classmethod
    def parse(cls, text: object, what: Subject = ("job", "compression")) -> Codec | None:
        """Read a setting such as `int8` or `top-k:0.05`; None for `none`. Raises `ConfigError`, which names `what`."""
        if text == PLAIN:
            return None
        name, colon, share = text.partition(":") if isinstance(text, str) and len(text) <= _LONGEST else ("", "", "")
        if name not in CODECS or (colon and name != "top-k"):
            raise ConfigError(what, expected=_EXPECTED, got=shown(text))
        if name != "top-k":
            return cls(name)
        try:
            kept = float(share) if colon else DEFAULT_SHARE
        except ValueError:
            kept = 0.0
        if not LEAST_SHARE <= kept <= 1:
            raise ConfigError(what, expected=f"a share from {LEAST_SHARE} to 1", got=shown(text))
        return cls(name, kept)

    @property
    def feedback(self) -> bool:
        """Whether what it leaves out is worth keeping for the next update (error feedback)."""
        return self.steps > 0

    @property
    def steps(self) -> int:
        """The largest code of a difference, a whole number; 0 where differences aren't coded in steps."""
        return _STEPS.get(self.name, 0)

    @property
    def whole(self) -> Codec:
        """The codec for weights that are no difference to others: coded in steps, they would be too coarse to train
        from."""
        return Codec("float16") if self.feedback else self

    def __str__(self) -> str:
        return f"{self.name}:{self.share!r}" if self.share else self.name


def agreed(setting: str, known: Collection[str]) -> str | None:
    """The codec of a device's updates as text; None for none, also where the device doesn't know the job's. Raises
    `ConfigError` if the setting is wrong."""
    codec = Codec.parse(setting)
    return None if codec is None or codec.name not in known else str(codec)

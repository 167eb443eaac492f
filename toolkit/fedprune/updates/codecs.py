"""Codecs of updates and weights: a job's setting, and what a device supports of it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from fedprune.core.errors import ConfigError, Subject, value_text

# No codec: a tensor file of float32.
PLAIN = "none"

# The strategy's own codec (`fedprune.strategies.strategy.Strategy.compression`).
AUTO = "auto"

# The codec of a device's updates, and that of the weights that it is sent, as text; None for plain files.
Codecs = tuple[str | None, str | None]

NO_CODECS: Codecs = (None, None)

# The largest code of a difference, which is a whole number times a scale.
_MAX_CODES = {"int8": 127, "int4": 7, "top-k": 127}

# The codecs that a job may ask for; a device announces those that it supports in its birth.
CODECS = tuple(_MAX_CODES)

# Those for the weights that devices are sent. With `top-k` devices would train on from what most of the model once was,
# and an average of their weights would forget what has moved since.
DOWNLOAD_CODECS = tuple(n for n in CODECS if n != "top-k")

DEFAULT_SHARE = 0.05
MIN_SHARE = 1e-5

_EXPECTED = f"{AUTO}, {PLAIN}, {', '.join(CODECS)} or top-k with a share, such as top-k:{DEFAULT_SHARE}"
_MAX_SETTING_LENGTH = 40


@dataclass(frozen=True)
class Codec:
    """A codec with its setting. All are packed by zlib where that makes them smaller.

    Attributes:
        name: `int8`, `int4`: differences to the weights that were sent, in 255 or 15 steps per row or tensor. `top-k`:
            the largest differences alone, in 255 steps.
        share: Of `top-k`, the share of each tensor's elements that travels.
    """

    name: str
    share: float = 0.0

    @classmethod
    def parse(cls, text: object, what: Subject = ("job", "compression")) -> Codec | None:
        """Read a setting such as `int8` or `top-k:0.05`; None for `none`. Raises `ConfigError`, which names `what`."""
        if text == PLAIN:
            return None
        name, colon, share = (
            text.partition(":") if isinstance(text, str) and len(text) <= _MAX_SETTING_LENGTH else ("", "", "")
        )
        if name not in CODECS or (colon and name != "top-k"):
            raise ConfigError(what, expected=_EXPECTED, got=value_text(text))
        if name != "top-k":
            return cls(name)
        try:
            kept_share = float(share) if colon else DEFAULT_SHARE
        except ValueError:
            kept_share = 0.0
        if not MIN_SHARE <= kept_share <= 1:
            raise ConfigError(what, expected=f"a share from {MIN_SHARE} to 1", got=value_text(text))
        return cls(name, kept_share)

    @property
    def steps(self) -> int:
        """The largest code of a difference; 0 for `HALF_CODEC`, which has no codes."""
        return _MAX_CODES.get(self.name, 0)

    def __str__(self) -> str:
        return f"{self.name}:{self.share!r}" if self.share else self.name


# Float16, for weights that are not the difference to others: coded in steps they would be too coarse to train from.
HALF_CODEC = Codec("half")


def agreed_codec(setting: str, device_codecs: Collection[str]) -> str | None:
    """The codec of a device's updates as text; None if the job has none or the device doesn't support it. Raises
    `ConfigError` if the setting is wrong."""
    codec = Codec.parse(setting)
    return None if codec is None or codec.name not in device_codecs else str(codec)

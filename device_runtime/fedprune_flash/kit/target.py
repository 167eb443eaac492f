"""The kind of board that a kit is for: a Python, an architecture, and whether the board has its own onnxruntime."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fedprune.core.errors import ConfigError, value_text
from fedprune.core.validation import check_word

PYTHONS = ("3.10", "3.11", "3.12", "3.13")  # those of JetPack 6, Raspberry Pi OS 12, JetPack 7 and Raspberry Pi OS 13

ARCHITECTURES = ("aarch64", "x86_64")

# Packages of JetPack, built for its GPU and for each other, with their minimum versions.
JETPACK_PACKAGES: Mapping[str, str] = {"numpy": "1.23", "onnxruntime": "1.18"}

# pip finds a wheel that is tagged for an older glibc under that tag only.
_GLIBC = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")

_MINOR = re.compile(r"3\.(\d{1,2})")


@dataclass(frozen=True)
class BoardTarget:
    """The kind of board that a kit is for.

    `python` is its version, such as "3.13"; compiled wheels suit one version. `architecture` is `aarch64` or `x86_64`.
    On a `jetson` the board's own onnxruntime-gpu and TensorRT are used, which nothing in the kit may shadow. Raises
    `ConfigError` if there are no wheels for such a board.
    """

    python: str = "3.13"
    architecture: str = "aarch64"
    jetson: bool = False

    def __post_init__(self) -> None:
        check_word("Python of the board", self.python, PYTHONS)
        if self.architecture not in ARCHITECTURES:
            hint = ""
            if self.architecture in ("armv6l", "armv7l", "armhf"):
                hint = "There is no onnxruntime for a 32-bit system: use the 64-bit image."
            raise ConfigError(
                "architecture of the board",
                expected=" or ".join(ARCHITECTURES),
                got=value_text(self.architecture),
                hint=hint,
            )
        if self.jetson and self.architecture != "aarch64":
            raise ConfigError("architecture of a Jetson", expected="aarch64", got=value_text(self.architecture))

    @property
    def version(self) -> tuple[int, int]:
        match = _MINOR.fullmatch(self.python)
        return 3, int(match[1]) if match else 0

    @property
    def platforms(self) -> tuple[str, ...]:
        """Platform tags of wheels that run there, the newest first."""
        return tuple(f"{tag}_{self.architecture}" for tag in _GLIBC)

    @property
    def extra(self) -> str:
        """The extra of fedprune that the board needs."""
        return "jetson" if self.jetson else "board"

    @property
    def system_packages(self) -> Mapping[str, str]:
        """Packages of the board's own Python with their minimum versions; a kit has no wheel of these."""
        return JETPACK_PACKAGES if self.jetson else {}

    @property
    def required_modules(self) -> Mapping[str, str]:
        """Modules that must load on the board after installation, with their minimum versions."""
        return {name: self.system_packages.get(name, "") for name in ("numpy", "onnxruntime", "fedprune_device")}

    def __str__(self) -> str:
        return f"Python {self.python} on {self.architecture}" + (", Jetson" if self.jetson else "")

"""JetPack releases: which software a Jetson's L4T release brings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fedprune.core.errors import ProfileError

# The file by which a Jetson is known; its first line is the release.
TEGRA_RELEASE = Path("/etc/nv_tegra_release")

_RELEASE_PATTERN = re.compile(r"#?\s*R(\d{1,3})\s*\(release\),\s*REVISION:\s*(\d{1,3}(?:\.\d{1,3}){0,2})(?![.\d])")
_NUMBER_PATTERN = re.compile(r"\d{1,3}(\.\d{1,3}){0,3}")
_RUNTIME_PYTHON = (3, 10)


@dataclass(frozen=True)
class JetPack:
    """A JetPack release: its version, its first L4T release, and the Python and TensorRT of its system."""

    name: str
    l4t: tuple[int, ...]
    python: str
    tensorrt: str

    @property
    def has_supported_python(self) -> bool:
        """Whether its Python is new enough for what boards run."""
        return tuple(int(n) for n in self.python.split(".")) >= _RUNTIME_PYTHON


# L4T to JetPack: https://github.com/rbonghi/jetson_stats. What they bring:
# https://developer.nvidia.com/embedded/linux-tegra-r3272 and https://velog.io/@everglow83/TX2-TensorRT (4.6),
# https://developer.nvidia.com/embedded/jetpack-sdk-51, https://github.com/dusty-nv/jetson-containers (6.0),
# https://github.com/pytorch/TensorRT/pull/3453 (6.1, 6.2), https://github.com/roboflow/inference/pull/2531 (7.2),
# https://developer.nvidia.com/embedded/jetpack/downloads/archive-7.1.md (7.0, 7.1).
# Ascending by L4T release.
JETPACK_RELEASES = (
    JetPack("4.6", (32, 6), "3.6", "8.0"),
    JetPack("4.6.1", (32, 7), "3.6", "8.2"),
    JetPack("5.1", (35, 2), "3.8", "8.5"),
    JetPack("6.0", (36, 3), "3.10", "10.0"),
    JetPack("6.1", (36, 4), "3.10", "10.3"),
    JetPack("6.2", (36, 4, 3), "3.10", "10.3"),
    JetPack("7.0", (38, 2), "3.12", "10.13"),
    JetPack("7.1", (38, 4), "3.12", "10.13"),
    JetPack("7.2", (39, 2), "3.12", "10.16"),
)


def l4t_release(text: str) -> str:
    """The release in the first line of /etc/nv_tegra_release, such as "36.4.3"; empty where it names none."""
    match = _RELEASE_PATTERN.match(text.strip())
    return f"{match[1]}.{match[2]}" if match else ""


def jetpack_of_release(l4t: str) -> JetPack | None:
    """The JetPack release of an L4T release: the newest of the same line that isn't newer; None for an unknown line.
    Raises `ProfileError` if this is no number of a release."""
    if not _NUMBER_PATTERN.fullmatch(l4t):
        raise ProfileError("L4T release", expected="numbers with dots, such as 36.4.3", got=repr(l4t[:40]))
    number = tuple(int(n) for n in l4t.split("."))
    fitting = [r for r in JETPACK_RELEASES if r.l4t[0] == number[0] and r.l4t <= number]
    return fitting[-1] if fitting else None

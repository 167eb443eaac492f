"""A kind of board: processor, memory, speed, link, storage, software, every figure with its source.

Profiles are TOML files that people write and JSON that boards get. `docs/add-a-board.md` has the table of keys. A
profile promises; what a board measures of itself (`probe_report`) beats it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from fedprune.core import validation
from fedprune.core.errors import ProfileError
from fedprune.core.records import convert_record, encode_record, number_range, pattern_text, word_of
from fedprune.core.toml_file import read_toml

# What a board computes with: all on its processor; all on its GPU; or predictions in TensorRT engines and the rest on
# the GPU. What doesn't work on the GPU is computed on the processor.
TIERS = ("onnxruntime-cpu", "onnxruntime-cuda", "tensorrt")

Watts = Annotated[float, number_range(0, 10**5)]
Text = Annotated[str, pattern_text(r"\s*\S[\s\S]*", "a text")]
Texts = tuple[Text, ...]


@dataclass(frozen=True)
class CpuFigures:
    """The processor: cores that Linux schedules on, highest sustained clock, instruction sets that kernels may use."""

    cores: Annotated[int, number_range(1, 4096)]
    clock_hz: Annotated[int, number_range(10**7, 10**11)]
    isa: Texts


@dataclass(frozen=True)
class MemoryFigures:
    """Main memory.

    Attributes:
        total_bytes: What Linux reports as MemTotal.
        bandwidth_bytes_s: Sustained traffic of one large copy, read plus write.
        reserve_bytes: Kept for the system and the application.
        training_share: Share of the rest that training may use.
    """

    total_bytes: Annotated[int, number_range(2**20, 2**50)]
    bandwidth_bytes_s: Annotated[float, number_range(10**6, 10**14)]
    reserve_bytes: Annotated[int, number_range(0, 2**50)]
    training_share: Annotated[float, number_range(0.01, 1)]


@dataclass(frozen=True)
class ComputeFigures:
    """Speed of the processor: peak float32 rate of all cores in FLOP/s, and the share of it that the probe's training
    step reaches."""

    peak_flops: Annotated[float, number_range(10**6, 10**16)]
    efficiency: Annotated[float, number_range(0.0001, 1)]


@dataclass(frozen=True)
class AcceleratorFigures:
    """A graphics or neural unit in addition to the processor.

    Attributes:
        kind: Its programming interface.
        shared_memory: Whether it shares the main memory.
        sm: CUDA compute capability, such as 8.7.
        peak_flops: Peak float32 rate.
        bandwidth_bytes_s: Rate at which it reads and writes its memory.
    """

    kind: Annotated[str, word_of(("cuda", "other"))]
    shared_memory: bool
    sm: Text | None = None
    peak_flops: Annotated[float, number_range(10**6, 10**17)] | None = None
    bandwidth_bytes_s: Annotated[float, number_range(10**6, 10**14)] | None = None


@dataclass(frozen=True)
class LinkFigures:
    """The way to the server: rates, the round trip, and the bytes, down plus up, that one round may use."""

    up_bytes_s: Annotated[float, number_range(1, 10**12)]
    down_bytes_s: Annotated[float, number_range(1, 10**12)]
    latency_s: Annotated[float, number_range(0, 3600)]
    bytes_per_round: Annotated[int, number_range(1, 2**50)]

    @property
    def delay_s(self) -> float:
        """Seconds of a transfer beside those of its bytes: it is announced before and acknowledged after."""
        return 2 * self.latency_s


@dataclass(frozen=True)
class PowerFigures:
    """Power at the wall, of the idle board and with all cores busy."""

    idle_w: Watts | None = None
    load_w: Watts | None = None


@dataclass(frozen=True)
class StorageFigures:
    """Bytes that fedprune may take of the board's disk or card."""

    budget_bytes: Annotated[int, number_range(2**20, 2**50)]


@dataclass(frozen=True)
class SoftwareFigures:
    """The Python of the board's system, the newest onnxruntime that it loads, what computes, and its TensorRT."""

    python: Text
    onnxruntime: Text
    tier: Annotated[str, word_of(TIERS)]
    tensorrt: Text | None = None


CLASS_OF_SECTION: dict[str, type] = {
    "cpu": CpuFigures,
    "memory": MemoryFigures,
    "compute": ComputeFigures,
    "accelerator": AcceleratorFigures,
    "link": LinkFigures,
    "power": PowerFigures,
    "storage": StorageFigures,
    "software": SoftwareFigures,
}

FORMAT = "fedprune.profile/1"
# How a source begins: an address, a calculation from other figures, or a reasoned guess.
SOURCE_SCHEMES = ("https://", "http://", "derived: ", "estimate: ")

ARCHES = ("aarch64", "x86_64")
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
# Characters after a source's scheme: "estimate: ?" is no source.
_MIN_SOURCE_LENGTH = 8

# Full: the runtime runs on the software that the board ships with. Limited: it needs a newer Python of the user's.
SUPPORT_LEVELS = ("full", "limited")


@dataclass(frozen=True)
class HardwareProfile:
    """A kind of board.

    Attributes:
        name: Short name, unique in a store (lower-case letters, digits, dots, dashes).
        family: Boards that share an image or installer, such as raspberry-pi.
        arch: aarch64 or x86_64.
        identify: Texts of which one occurs in the board's device tree (model or compatible); none for generic profiles.
        soc: The processor's name in the device tree's list of what it is compatible with, such as tegra234: it tells a
            board on a carrier that no text of `identify` knows.
        support: One of `SUPPORT_LEVELS`.
        advice: What a user can do where the support is limited; empty else.
        sources: For every figure ("cpu.cores") where it comes from.
    """

    name: Annotated[str, pattern_text(NAME_PATTERN.pattern, "up to 64 lower-case letters, digits, dots and dashes")]
    title: Text
    family: Text
    arch: Annotated[str, word_of(ARCHES)]
    cpu: CpuFigures
    memory: MemoryFigures
    compute: ComputeFigures
    link: LinkFigures
    storage: StorageFigures
    software: SoftwareFigures
    accelerator: AcceleratorFigures | None = None
    power: PowerFigures | None = None
    identify: Texts = ()
    soc: str = ""
    support: Annotated[str, word_of(SUPPORT_LEVELS)] = "full"
    advice: str = ""
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def training_memory_bytes(self) -> int:
        return round((self.memory.total_bytes - self.memory.reserve_bytes) * self.memory.training_share)

    @property
    def train_rate(self) -> float:
        """Promised float32 rate of training, in FLOP/s."""
        return self.compute.peak_flops * self.compute.efficiency

    @property
    def training_gpu(self) -> AcceleratorFigures | None:
        """The GPU on which boards of this tier train; None where the processor trains, or its peak rate is unknown."""
        unit = self.accelerator
        if unit is None or not self.has_cuda or unit.peak_flops is None or self.software.tier == TIERS[0]:
            return None
        return unit

    @property
    def has_cuda(self) -> bool:
        return self.accelerator is not None and self.accelerator.kind == "cuda"

    def figures(self) -> dict[str, Any]:
        """Every figure that is set, by dotted name, in the order of the schema."""
        sections = ((section, getattr(self, section)) for section in CLASS_OF_SECTION)
        return {
            f"{section}.{f.name}": value
            for section, section_figures in sections
            if section_figures is not None
            for f in fields(section_figures)
            if (value := getattr(section_figures, f.name)) is not None
        }

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types; what is not set is left out."""
        body = json.loads(encode_record(replace(self)))  # what msgspec reads has defaults in the class alone
        for section in CLASS_OF_SECTION:
            body[section] = {k: v for k, v in (body.get(section) or {}).items() if v is not None}
        return {key: value for key, value in body.items() if value or key == "identify"}

    def to_json(self) -> str:
        """Canonical JSON: the same profile always gives the same text."""
        return json.dumps(
            {"format": FORMAT, **self.to_dict()}, sort_keys=True, separators=(",", ":"), ensure_ascii=True
        )

    @classmethod
    def from_dict(cls, body: Mapping[str, Any], origin: str = "profile") -> HardwareProfile:
        """Read and check tables and keys as in TOML. Raises `ProfileError` for a key that is unknown, missing, of the
        wrong type, out of range or without source."""
        validation.check_keys((*(f.name for f in fields(cls)), "format"), body, origin, error=ProfileError)
        if body.get("format", FORMAT) != FORMAT:
            raise ProfileError(f"{origin}: format", expected=FORMAT, got=repr(body["format"]))
        for section, kind in CLASS_OF_SECTION.items():
            if isinstance(section_body := body.get(section), Mapping):
                validation.check_keys(
                    [f.name for f in fields(kind)], section_body, f"{origin}: {section}", error=ProfileError
                )
        plain = {key: _normalise_numbers(value) for key, value in body.items()}
        values = {**plain, "sources": _flat_sources(body.get("sources", {}), origin)}
        try:
            profile = convert_record(cls, values, origin, ProfileError)
        except ProfileError as error:
            hint = "docs/add-a-board.md says what each figure is, and its unit."
            raise ProfileError(error.what, expected=error.expected, got=error.got, hint=hint) from None
        profile._check(origin)
        return profile

    def _check(self, origin: str) -> None:
        memory = self.memory
        if memory.reserve_bytes >= memory.total_bytes:
            raise ProfileError(
                f"{origin}: memory.reserve_bytes",
                expected=f"less than memory.total_bytes ({memory.total_bytes})",
                got=memory.reserve_bytes,
            )
        idle, load = (self.power.idle_w, self.power.load_w) if self.power is not None else (None, None)
        if idle is not None and load is not None and idle > load:
            raise ProfileError(f"{origin}: power.idle_w", expected=f"at most power.load_w ({load})", got=idle)
        if (self.support == "limited") != bool(self.advice):
            raise ProfileError(
                f"{origin}: advice",
                expected="what a user can do, where the support is limited, and only there",
                got=repr(self.advice[:80]),
            )
        figures = self.figures()
        for key in figures:
            if key not in self.sources:
                raise ProfileError(
                    f"{origin}: {key} has no source",
                    expected=f'{key} = "..." under [sources]',
                    hint='Give an address, or "derived: ..." or "estimate: ..." with the reasoning.',
                )
        for key, source in self.sources.items():
            if key not in figures:
                raise ProfileError(
                    f"{origin}: sources.{key} is the source of a figure that isn't there",
                    hint="Remove it, or correct the name.",
                )
            scheme = next((s for s in SOURCE_SCHEMES if source.startswith(s)), None)
            if scheme is None or len(source) < len(scheme) + _MIN_SOURCE_LENGTH:
                raise ProfileError(
                    f"{origin}: sources.{key}",
                    expected='an address, or "derived: ..." or "estimate: ..." with the reasoning',
                    got=repr(source),
                )

    @classmethod
    def from_toml(cls, path: Path) -> HardwareProfile:
        """Read and check a TOML file; errors name it. Raises `ProfileError`, and `MissingExtraError` as `read_toml`."""
        return cls.from_dict(read_toml(path, ProfileError), str(path))

    @classmethod
    def from_json(cls, text: str | bytes, origin: str = "profile") -> HardwareProfile:
        """Read and check what `to_json` writes. Raises `ProfileError` if it is no JSON, of another format, or
        `from_dict` refuses it."""
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ProfileError(f"{origin}: this is not JSON ({error})") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            got = body.get("format") if isinstance(body, dict) else type(body).__name__
            raise ProfileError(f"{origin}: format", expected=FORMAT, got=repr(got))
        return cls.from_dict(body, origin)


def _normalise_numbers(value: object) -> object:
    """A TOML value with floats that are whole numbers as integers: people write 1.8e9, which TOML reads as a float.
    Numbers that are not finite become text, so that the check of types refuses them and names their key."""
    if isinstance(value, Mapping):
        return {key: _normalise_numbers(inner) for key, inner in value.items()}
    if isinstance(value, float):
        return int(value) if value.is_integer() else value if math.isfinite(value) else str(value)
    return value


def _flat_sources(body: object, origin: str) -> dict[str, str]:
    sources: dict[str, str] = {}
    if not isinstance(body, Mapping):
        raise ProfileError(f"{origin}: sources", expected="a table", got=type(body).__name__)
    for section, section_sources in body.items():
        # `cpu.cores = "..."` in TOML is a table in a table; a quoted "cpu.cores" is a key.
        rows = section_sources.items() if isinstance(section_sources, Mapping) else [("", section_sources)]
        for figure, source in rows:
            key = f"{section}.{figure}" if figure else str(section)
            if not isinstance(source, str):
                raise ProfileError(f"{origin}: sources.{key}", expected="a text", got=repr(source))
            sources[key] = source
    return sources

"""A kind of board: processor, memory, speed, link, storage, software, every figure with its source.

Profiles are TOML files that people write and JSON that boards get. `docs/add-a-board.md` has the table of keys. A
profile promises; what a board measures of itself (`probe_report`) beats it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from fedprune.core import validation
from fedprune.core.errors import ProfileError
from fedprune.core.toml_file import read_toml
from fedprune.core.validation import is_number, is_whole

TIERS = ("onnxruntime-cpu", "onnxruntime-cuda", "tensorrt")
"""The providers of a board, as far as they work there: with the first all on its processor, with the second all on its
GPU, with the third predictions in TensorRT engines and the rest on the GPU; where it doesn't, on the processor."""


def _figure(doc: str, unit: str, low: float, high: float, *, optional: bool = False) -> Any:
    meta = {"doc": doc, "unit": unit, "low": low, "high": high, "kind": "number"}
    return field(default=None, metadata=meta) if optional else field(metadata=meta)


def _text(doc: str, *, choices: tuple[str, ...] = (), optional: bool = False, kind: str = "text") -> Any:
    meta = {"doc": doc, "unit": "", "choices": choices, "kind": kind}
    return field(default=None, metadata=meta) if optional else field(metadata=meta)


@dataclass(frozen=True)
class Cpu:
    """The processor."""

    cores: int = _figure("Cores that Linux schedules on.", "cores", 1, 4096)
    clock_hz: int = _figure("Highest sustained clock.", "Hz", 10**7, 10**11)
    isa: tuple[str, ...] = _text("Instruction sets that kernels may use.", kind="texts")


@dataclass(frozen=True)
class Memory:
    """Main memory."""

    total_bytes: int = _figure("What Linux reports as MemTotal.", "bytes", 2**20, 2**50)
    bandwidth_bytes_s: float = _figure(
        "Sustained traffic of one large copy, read plus write.", "bytes/s", 10**6, 10**14
    )
    reserve_bytes: int = _figure("Kept for the system and the application.", "bytes", 0, 2**50)
    training_share: float = _figure("Share of the rest that training may use.", "0 to 1", 0.01, 1)


@dataclass(frozen=True)
class Compute:
    """Speed of the processor."""

    peak_flops: float = _figure("Peak float32 rate of all cores.", "FLOP/s", 10**6, 10**16)
    efficiency: float = _figure("Share of the peak that the probe's training step reaches.", "0 to 1", 0.0001, 1)


@dataclass(frozen=True)
class Accelerator:
    """A graphics or neural unit in addition to the processor."""

    kind: str = _text("Programming interface.", choices=("cuda", "other"))
    shared_memory: bool = _text("Whether it shares the main memory.", kind="flag")
    sm: str | None = _text("CUDA compute capability, such as 8.7.", optional=True)
    peak_flops: float | None = _figure("Peak float32 rate.", "FLOP/s", 10**6, 10**17, optional=True)
    bandwidth_bytes_s: float | None = _figure(
        "Rate at which it reads and writes its memory.", "bytes/s", 10**6, 10**14, optional=True
    )


@dataclass(frozen=True)
class Link:
    """The way to the server."""

    up_bytes_s: float = _figure("Rate from board to server.", "bytes/s", 1, 10**12)
    down_bytes_s: float = _figure("Rate from server to board.", "bytes/s", 1, 10**12)
    latency_s: float = _figure("Round trip to the server.", "s", 0, 3600)
    bytes_per_round: int = _figure("Bytes, down plus up, that one round may use.", "bytes", 1, 2**50)


@dataclass(frozen=True)
class Power:
    """Power at the wall."""

    idle_w: float | None = _figure("Power of the idle board.", "W", 0, 10**5, optional=True)
    load_w: float | None = _figure("Power with all cores busy.", "W", 0, 10**5, optional=True)


@dataclass(frozen=True)
class Storage:
    """Room on the board's disk or card."""

    budget_bytes: int = _figure("Bytes that fedprune may take.", "bytes", 2**20, 2**50)


@dataclass(frozen=True)
class Software:
    """The board's software."""

    python: str = _text("Python of its system.")
    onnxruntime: str = _text("Newest onnxruntime that it loads.")
    tier: str = _text("What computes.", choices=TIERS)
    tensorrt: str | None = _text("TensorRT of its system.", optional=True)


SECTIONS: dict[str, tuple[type, bool]] = {
    "cpu": (Cpu, True),
    "memory": (Memory, True),
    "compute": (Compute, True),
    "accelerator": (Accelerator, False),
    "link": (Link, True),
    "power": (Power, False),
    "storage": (Storage, True),
    "software": (Software, True),
}
"""Tables of a profile: their class and whether they are required."""


FORMAT = "fedprune.profile/1"
SCHEMES = ("https://", "http://", "derived: ", "estimate: ")
"""How a source begins: an address, a calculation from other figures, or a reasoned guess."""

ARCHES = ("aarch64", "x86_64")
NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")
"""The pattern of profile names."""
_MIN_REASON = 8

_TOP = ("name", "title", "family", "arch", "identify", "soc", "support", "advice")

SUPPORT = ("full", "limited")
"""Full: the runtime runs on the software that the board ships with. Limited: it needs a newer Python of the user's."""


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
        support: One of `SUPPORT`.
        advice: What a user can do where the support is limited; empty else.
        sources: For every figure ("cpu.cores") where it comes from.
    """

    name: str
    title: str
    family: str
    arch: str
    cpu: Cpu
    memory: Memory
    compute: Compute
    link: Link
    storage: Storage
    software: Software
    accelerator: Accelerator | None = None
    power: Power | None = None
    identify: tuple[str, ...] = ()
    soc: str = ""
    support: str = "full"
    advice: str = ""
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def training_bytes(self) -> int:
        """Memory that a training process may take."""
        return round((self.memory.total_bytes - self.memory.reserve_bytes) * self.memory.training_share)

    @property
    def train_rate(self) -> float:
        """Promised float32 rate of training, in FLOP/s."""
        return self.compute.peak_flops * self.compute.efficiency

    @property
    def gpu(self) -> Accelerator | None:
        """The GPU on which boards of this tier train; None where the processor trains, or its peak rate is unknown."""
        unit = self.accelerator
        if unit is None or not self.cuda or unit.peak_flops is None or self.software.tier == TIERS[0]:
            return None
        return unit

    @property
    def cuda(self) -> bool:
        """Whether boards have a GPU that CUDA drives."""
        return self.accelerator is not None and self.accelerator.kind == "cuda"

    def figures(self) -> dict[str, Any]:
        """Every figure that is set, by dotted name, in the order of the schema."""
        out: dict[str, Any] = {}
        for section, (kind, _) in SECTIONS.items():
            part = getattr(self, section)
            if part is not None:
                values = ((f"{section}.{f.name}", getattr(part, f.name)) for f in fields(kind))
                out.update((key, value) for key, value in values if value is not None)
        return out

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types; what is not set is left out."""
        body: dict[str, Any] = {
            "name": self.name,
            "title": self.title,
            "family": self.family,
            "arch": self.arch,
            "identify": list(self.identify),
        }
        if self.soc:
            body["soc"] = self.soc
        if self.support != "full":
            body |= {"support": self.support, "advice": self.advice}
        sources: dict[str, dict[str, str]] = {}
        for key, value in self.figures().items():
            section, figure = key.split(".", 1)
            body.setdefault(section, {})[figure] = list(value) if isinstance(value, tuple) else value
            sources.setdefault(section, {})[figure] = self.sources[key]
        body["sources"] = sources
        return body

    def to_json(self) -> str:
        """Canonical JSON: the same profile always gives the same text."""
        return json.dumps(
            {"format": FORMAT, **self.to_dict()}, sort_keys=True, separators=(",", ":"), ensure_ascii=True
        )

    @classmethod
    def from_dict(cls, body: Mapping[str, Any], where: str = "profile") -> HardwareProfile:
        """Read and check tables and keys as in TOML. Raises `ProfileError` for a key that is unknown, missing, of the
        wrong type, out of range or without source."""
        validation.only((*_TOP, *SECTIONS, "sources", "format"), body, where, error=ProfileError)
        if body.get("format", FORMAT) != FORMAT:
            raise ProfileError(f"{where}: format", expected=FORMAT, got=repr(body["format"]))
        top = {key: _checked_text(body, key, where) for key in ("name", "title", "family")}
        if not NAME.fullmatch(top["name"]):
            raise ProfileError(
                f"{where}: name",
                expected="up to 64 lower-case letters, digits, dots and dashes",
                got=repr(top["name"]),
            )
        arch = _checked_text(body, "arch", where, ARCHES)
        parts: dict[str, Any] = {}
        for section, (kind, required) in SECTIONS.items():
            if section in body:
                parts[section] = _section(kind, section, body[section], where)
            elif required:
                raise ProfileError(f"{where}: table [{section}] is missing", hint="See docs/add-a-board.md.")
        profile = cls(
            name=top["name"],
            title=top["title"],
            family=top["family"],
            arch=arch,
            **parts,
            identify=_texts(body.get("identify", []), f"{where}: identify"),
            soc=_checked_text(body, "soc", where) if "soc" in body else "",
            advice=_checked_text(body, "advice", where) if "advice" in body else "",
            support=_checked_text({"support": "full", **body}, "support", where, SUPPORT),
            sources=_flat_sources(body.get("sources", {}), where),
        )
        profile._check(where)
        return profile

    def _check(self, where: str) -> None:
        memory = self.memory
        if memory.reserve_bytes >= memory.total_bytes:
            raise ProfileError(
                f"{where}: memory.reserve_bytes",
                expected=f"less than memory.total_bytes ({memory.total_bytes})",
                got=memory.reserve_bytes,
            )
        idle, load = (self.power.idle_w, self.power.load_w) if self.power is not None else (None, None)
        if idle is not None and load is not None and idle > load:
            raise ProfileError(f"{where}: power.idle_w", expected=f"at most power.load_w ({load})", got=idle)
        if (self.support == "limited") != bool(self.advice):
            raise ProfileError(
                f"{where}: advice",
                expected="what a user can do, where the support is limited, and only there",
                got=repr(self.advice[:80]),
            )
        figures = self.figures()
        for key in figures:
            if key not in self.sources:
                raise ProfileError(
                    f"{where}: {key} has no source",
                    expected=f'{key} = "..." under [sources]',
                    hint='Give an address, or "derived: ..." or "estimate: ..." with the reasoning.',
                )
        for key, source in self.sources.items():
            if key not in figures:
                raise ProfileError(
                    f"{where}: sources.{key} is the source of a figure that isn't there",
                    hint="Remove it, or correct the name.",
                )
            scheme = next((s for s in SCHEMES if source.startswith(s)), None)
            if scheme is None or len(source) < len(scheme) + _MIN_REASON:
                raise ProfileError(
                    f"{where}: sources.{key}",
                    expected='an address, or "derived: ..." or "estimate: ..." with the reasoning',
                    got=repr(source),
                )

    @classmethod
    def from_toml(cls, path: Path) -> HardwareProfile:
        """Read and check a TOML file; errors name it. Raises `ProfileError`, and `MissingExtraError` as `read_toml`."""
        return cls.from_dict(read_toml(path, ProfileError), str(path))

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "profile") -> HardwareProfile:
        """Read and check what `to_json` writes. Raises `ProfileError` if it is no JSON, of another format, or
        `from_dict` refuses it."""
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ProfileError(f"{where}: this is not JSON ({error})") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            got = body.get("format") if isinstance(body, dict) else type(body).__name__
            raise ProfileError(f"{where}: format", expected=FORMAT, got=repr(got))
        return cls.from_dict(body, where)


def _section(kind: type, section: str, body: object, where: str) -> Any:
    if not isinstance(body, Mapping):
        raise ProfileError(f"{where}: {section}", expected="a table", got=type(body).__name__)
    known = {f.name: f for f in fields(kind)}
    validation.only(known, body, f"{where}: {section}", error=ProfileError)
    values: dict[str, Any] = {}
    for name, spec in known.items():
        key = f"{where}: {section}.{name}"
        if name in body:
            values[name] = _value(body[name], str(spec.type), spec.metadata, key)
        elif spec.default is MISSING:
            raise ProfileError(f"{key} is missing", expected=spec.metadata["doc"])
    return kind(**values)


def _value(value: object, annotation: str, meta: Mapping[str, Any], key: str) -> Any:
    kind = meta["kind"]
    if kind == "texts":
        return _texts(value, key)
    if kind == "flag":
        return validation.truth(key, value, error=ProfileError)
    if kind == "text":
        choices = meta["choices"]
        if not isinstance(value, str) or not value or (choices and value not in choices):
            raise ProfileError(key, expected=", ".join(choices) or "a text", got=repr(value))
        return value
    low, high = meta["low"], meta["high"]
    whole = annotation == "int"
    # TOML writes 1.8e9 as a float; where it is a whole number, that is what was meant.
    if whole and isinstance(value, float) and value.is_integer():
        value = int(value)
    if whole and is_whole(value, low, high):
        return value
    if not whole and is_number(value, low, high):
        return float(value)
    doc = meta["doc"].removesuffix(".")
    raise ProfileError(
        f"{key} ({doc[0].lower()}{doc[1:]})",
        expected=f"{'a whole number' if whole else 'a number'} from {low:g} to {high:g} ({meta['unit']})",
        got=repr(value),
    )


def _checked_text(body: Mapping[str, Any], key: str, where: str, choices: tuple[str, ...] = ()) -> str:
    if key not in body:
        raise ProfileError(f"{where}: {key} is missing")
    value = body[key]
    if not isinstance(value, str) or not value.strip() or (choices and value not in choices):
        raise ProfileError(f"{where}: {key}", expected=", ".join(choices) or "a text", got=repr(value))
    return value


def _texts(value: object, key: str) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) and v for v in value):
        raise ProfileError(key, expected="a list of texts", got=repr(value))
    return tuple(value)


def _flat_sources(body: object, where: str) -> dict[str, str]:
    out: dict[str, str] = {}
    if not isinstance(body, Mapping):
        raise ProfileError(f"{where}: sources", expected="a table", got=type(body).__name__)
    for section, part in body.items():
        # `cpu.cores = "..."` in TOML is a table in a table; a quoted "cpu.cores" is a key.
        rows = part.items() if isinstance(part, Mapping) else [("", part)]
        for figure, source in rows:
            key = f"{section}.{figure}" if figure else str(section)
            if not isinstance(source, str):
                raise ProfileError(f"{where}: sources.{key}", expected="a text", got=repr(source))
            out[key] = source
    return out

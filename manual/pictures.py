"""Pictures that were drawn from measured numbers carry a digest of them, so that neither changes without the other."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

_KEYWORD = b"fedprune-data"
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Source:
    """The numbers that a picture shows.

    Attributes:
        results: The file of the numbers in `benchmarks/results`.
        select: The part of that file that is drawn.
        command: Measures and draws them.
    """

    results: str
    select: Callable[[Any], Any]
    command: str


def ends_of_tasks(runs: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What the picture of all tasks shows: per task the mean last scores of methods, where the first seed has all."""
    methods = ("fedavg", "one width", "heterofl int8", "fedprune")
    full = {task: rows for task, rows in runs.items() if all(rows.get(m, {}).get("0", {}).get("at") for m in methods)}
    return {
        task: {m: fmean(run["curve"][-1] for run in rows[m].values()) for m in methods} for task, rows in full.items()
    }


def _gallery(example: str) -> Source:
    return Source("gallery.json", lambda body: body["examples"][example]["runs"], "python -m benchmarks.gallery")


SOURCES: dict[str, Source] = {
    "docs/images/tasks-widths.png": Source(
        "tasks.json", lambda body: ends_of_tasks(body["runs"]), "python -m benchmarks.tasks --picture"
    ),
    "docs/images/gallery-clothes-boards.png": _gallery("clothes_on_pis"),
    "docs/images/gallery-clothes-curves.png": _gallery("clothes_on_pis"),
    "docs/images/gallery-motion-people.png": _gallery("motion_on_zeros"),
    "docs/images/gallery-vit-curves.png": _gallery("vit_on_orins"),
}  # fmt: skip
"""Every picture of numbers that somebody measured, by its path in the repository."""


def data_digest(data: object) -> str:
    """sha256 of numbers, however a file lays them out."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def stamp(picture: Path, data: object) -> None:
    """Write the digest of what was drawn into a PNG file, whose pixels stay as they are."""
    raw = picture.read_bytes()
    text = _KEYWORD + b"\0" + data_digest(data).encode()
    chunks = [chunk for chunk in _chunks(raw) if not chunk[1].startswith(_KEYWORD + b"\0")]
    chunks.insert(1, (b"tEXt", text))  # behind the header
    picture.write_bytes(_SIGNATURE + b"".join(_encode(kind, body) for kind, body in chunks))


def stamped(picture: Path) -> str:
    """The digest in a PNG file; empty if there is none."""
    if not picture.is_file():
        return ""
    texts = (body for kind, body in _chunks(picture.read_bytes()) if kind == b"tEXt")
    return next((t.partition(b"\0")[2].decode("latin-1") for t in texts if t.startswith(_KEYWORD + b"\0")), "")


def stale(root: Path) -> dict[str, Source]:
    """Pictures that don't show the numbers which lie next to them today."""
    bodies = {
        name: json.loads((root / "benchmarks/results" / name).read_text(encoding="utf-8"))
        for name in {source.results for source in SOURCES.values()}
    }
    return {
        path: source
        for path, source in SOURCES.items()
        if stamped(root / path) != data_digest(source.select(bodies[source.results]))
    }


def _chunks(raw: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = len(_SIGNATURE)
    while at < len(raw):
        (length,) = struct.unpack_from(">I", raw, at)
        yield raw[at + 4 : at + 8], raw[at + 8 : at + 8 + length]
        at += 12 + length


def _encode(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

"""A parser of bytes from outside, as the fuzzer sees it, and what it may do with any bytes at all."""

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fedprune.core.errors import FedpruneError


@dataclass(frozen=True)
class Target:
    """A parser.

    Attributes:
        name: `wing.what`.
        parse: Takes any bytes; returns anything, or raises one of `errors`.
        seeds: Sound inputs, each of which must be taken.
        text: Whether they are text.
        errors: What may be raised.
        factor: Bytes of memory that one byte of input may cost.
        constant: Bytes that any input may cost.
        share: How many inputs it gets, beside the others: slow parsers get fewer.
        frame: Puts a damaged input into what is around it, such as the digest or signature without which nobody would
            look at it.
    """

    name: str
    parse: Callable[[bytes], object]
    seeds: Sequence[bytes]
    text: bool = False
    errors: tuple[type[Exception], ...] = (FedpruneError,)
    factor: int = 64
    constant: int = 2**18
    share: float = 1.0
    frame: Callable[[bytes], bytes] = bytes

    def bound(self, size: int) -> int:
        """Bytes of memory that an input of this size may take while it is parsed."""
        return self.factor * size + self.constant


@cache
def scratch() -> Path:
    """A folder in memory, where there is one, for parsers of files."""
    shm = Path("/dev/shm")
    root = Path(tempfile.mkdtemp(prefix="fedprune-fuzz-", dir=shm if os.access(shm, os.W_OK) else None))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


def as_json(parse: Callable[[Any], object]) -> Callable[[bytes], object]:
    """A parser of what JSON gave, as one of bytes; bytes that are no JSON are none of its business."""

    def parse_json(raw: bytes) -> object:
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            return None
        return parse(body)

    return parse_json


def as_object(parse: Callable[[dict[str, Any]], object]) -> Callable[[bytes], object]:
    """The same for parsers whose callers have made sure that it is an object."""
    return as_json(lambda body: parse(body) if isinstance(body, dict) else None)


def as_text(parse: Callable[[str], object]) -> Callable[[bytes], object]:
    """A parser of text, as one of bytes."""
    return lambda raw: parse(raw.decode("utf-8", "replace"))


def as_file(parse: Callable[[Path], object], name: str) -> Callable[[bytes], object]:
    """A parser of a file (by its path; parsers may go by its name), as one of bytes."""

    def parse_file(raw: bytes) -> object:
        path = scratch() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
        return parse(path)

    return parse_file


def json_seeds(*bodies: object) -> tuple[bytes, ...]:
    """Bodies as JSON."""
    return tuple(json.dumps(body).encode() for body in bodies)

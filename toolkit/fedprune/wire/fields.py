"""Checks of message fields: each takes what JSON gave and returns the value, or says what it expected."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from fedprune.errors import ProtocolError, shown
from fedprune.wire.blob_ref import BlobRef, is_digest
from fedprune.wire.topics import check_device, check_job, check_name, check_tag

Check = Callable[[str, object], Any]
"""Takes the field's full name for the error and the value; returns the checked value."""

MAX_INT = 2**63 - 1
MAX_DEPTH = 8
"""Nesting that a free-form object may have."""

MAX_METRICS = 64

TRAINED, AVERAGED = "after", "average"
"""Which model of a device an update's metrics `accuracy_...` and `loss_...` are about, on its own test samples: the one
that it has just trained, and its own average with what is blended into it, where it keeps one."""

MAX_LOSS = 1e6
"""Losses beyond this, of either sign, are no measurements."""

_HEX = re.compile(r"[0-9a-f]*")
_METRIC = re.compile(r"[A-Za-z0-9_.:/-]{1,64}")


def served(metrics: Mapping[str, float], kind: str) -> float | None:
    """What an update says of the model that the device serves: its average where it keeps one, else what it trained.

    Args:
        metrics: The update's metrics.
        kind: `accuracy` or `loss`.

    Returns:
        The measure on the device's own test samples; None where it wasn't measured.
    """
    return metrics.get(f"{kind}_{AVERAGED}", metrics.get(f"{kind}_{TRAINED}"))


def one_line(value: str, limit: int = 500) -> str:
    """Somebody else's text as it may be logged, stored and shown: short, one line, nothing that steers a terminal."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in value[:limit]).split())
    return flat if len(value) <= limit else f"{flat}..."


def device(where: str, value: object) -> str:
    """A device's name."""
    return check_device(value, where)


def tag(where: str, value: object) -> str:
    """The tag of a receiver."""
    return check_tag(value, where)


def site(where: str, value: object) -> str:
    """A site's name."""
    return check_name(value, where)


def job(where: str, value: object) -> str:
    """A job's name."""
    return check_job(value, where)


def whole(low: int = 0, high: int = MAX_INT) -> Check:
    """A whole number in a range."""

    def check(where: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ProtocolError(where, expected=f"a whole number from {low} to {high}", got=shown(value))
        return value

    return check


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    """A finite number in a range."""
    span = "" if (low, high) == (-math.inf, math.inf) else f" from {low:g} to {high:g}"

    def check(where: str, value: object) -> float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                real = float(value)
            except OverflowError:
                real = math.inf
            if math.isfinite(real) and low <= real <= high:
                return real
        raise ProtocolError(where, expected=f"a finite number{span}", got=shown(value))

    return check


def text(limit: int) -> Check:
    """Text without control characters other than line ends and tabs."""

    def check(where: str, value: object) -> str:
        if not isinstance(value, str) or len(value) > limit or any(_unprintable(ord(c)) for c in value):
            raise ProtocolError(where, expected=f"text of at most {limit} printable characters", got=shown(value))
        return value

    return check


def _unprintable(code: int) -> bool:
    """Control characters of ASCII and Latin-1 but line ends and tabs, and halves of surrogate pairs."""
    return (code < 32 and code not in (9, 10)) or 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000


def choice(*options: str) -> Check:
    """One of a few words."""

    def check(where: str, value: object) -> str:
        if not isinstance(value, str) or value not in options:
            raise ProtocolError(where, expected=" or ".join(options), got=shown(value))
        return value

    return check


def digest(where: str, value: object) -> str:
    """A sha256 as hex."""
    if not isinstance(value, str) or not is_digest(value):
        raise ProtocolError(where, expected="64 hex digits", got=shown(value))
    return value


def hexadecimal(low: int, high: int | None = None) -> Check:
    """From `low` to `high` lower-case hex digits; exactly `low` of them by default."""
    most = low if high is None else high
    span = f"{low}" if most == low else f"{low} to {most}"

    def check(where: str, value: object) -> str:
        if not isinstance(value, str) or not low <= len(value) <= most or not _HEX.fullmatch(value) or len(value) % 2:
            raise ProtocolError(where, expected=f"{span} hex digits", got=shown(value))
        return value

    return check


def blob(where: str, value: object) -> BlobRef:
    """A blob reference."""
    if isinstance(value, BlobRef):
        return value
    try:
        return BlobRef.from_dict(value)
    except ProtocolError as error:
        raise ProtocolError(f"{where}: {error.what}", expected=error.expected, got=error.got) from error


def blobs(limit: int) -> Check:
    """Blob references by a short name."""

    def check(where: str, value: object) -> dict[str, BlobRef]:
        if not isinstance(value, Mapping) or len(value) > limit:
            raise ProtocolError(where, expected=f"an object of at most {limit} blobs", got=shown(value))
        return {check_name(key, f"{where}: key"): blob(f"{where}.{key}", item) for key, item in _keys(where, value)}

    return check


def blob_list(limit: int) -> Check:
    """A list of at least one blob reference."""

    def check(where: str, value: object) -> tuple[BlobRef, ...]:
        if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= limit:
            raise ProtocolError(where, expected=f"a list of 1 to {limit} blobs", got=shown(value))
        return tuple(blob(f"{where}[{i}]", item) for i, item in enumerate(value))

    return check


def true(where: str, value: object) -> bool:
    """The word true: what isn't so is left out."""
    if value is not True:
        raise ProtocolError(where, expected="true", got=shown(value))
    return True


def optional(check: Check) -> Check:
    """What `check` takes, or null."""
    return lambda where, value: None if value is None else check(where, value)


def wholes(limit: int, low: int, high: int) -> Check:
    """A list of whole numbers."""
    one = whole(low, high)

    def check(where: str, value: object) -> tuple[int, ...]:
        if not isinstance(value, (list, tuple)) or len(value) > limit:
            raise ProtocolError(where, expected=f"a list of at most {limit} numbers", got=shown(value))
        return tuple(one(f"{where}[{i}]", item) for i, item in enumerate(value))

    return check


def digests(limit: int) -> Check:
    """A list of at least one sha256 as hex."""

    def check(where: str, value: object) -> tuple[str, ...]:
        if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= limit:
            raise ProtocolError(where, expected=f"a list of 1 to {limit} digests", got=shown(value))
        return tuple(digest(f"{where}[{i}]", item) for i, item in enumerate(value))

    return check


def names(limit: int) -> Check:
    """A list of short names of what a peer knows, which may be more than this version does."""

    def check(where: str, value: object) -> tuple[str, ...]:
        if not isinstance(value, (list, tuple)) or len(value) > limit:
            raise ProtocolError(where, expected=f"a list of at most {limit} names", got=shown(value))
        return tuple(check_name(item, f"{where}[{i}]") for i, item in enumerate(value))

    return check


def metrics(where: str, value: object) -> dict[str, float]:
    """Finite numbers by name."""
    if not isinstance(value, Mapping) or len(value) > MAX_METRICS:
        raise ProtocolError(where, expected=f"an object of at most {MAX_METRICS} numbers", got=shown(value))
    one = number()
    for name in value:
        if not isinstance(name, str) or not _METRIC.fullmatch(name):
            raise ProtocolError(f"{where}: name of a metric", expected="letters, digits and _.:/-", got=shown(name))
    return {name: one(f"{where}[{name}]", item) for name, item in value.items()}


def believable(metrics: Mapping[str, float]) -> dict[str, float]:
    """What a device says that it measured, without what nobody can measure: it decides on densities, and on the end.

    Args:
        metrics: Numbers by name: `accuracy…` is from 0 to 1, `loss…` from −`MAX_LOSS` to `MAX_LOSS`; all are finite.
    """
    limits = {"accuracy": (0.0, 1.0), "loss": (-MAX_LOSS, MAX_LOSS)}
    found = {}
    for name, value in metrics.items():
        low, high = limits.get(name.split("_")[0], (-math.inf, math.inf))
        if math.isfinite(value) and low <= value <= high:
            found[name] = value
    return found


def plain(where: str, value: object) -> dict[str, Any]:
    """An object of plain JSON values, of bounded depth, with finite numbers."""
    if not isinstance(value, Mapping):
        raise ProtocolError(where, expected="an object", got=shown(value))
    return {key: _plain(where, item, MAX_DEPTH) for key, item in _keys(where, value)}


def assignment(where: str, value: object) -> dict[str, Any]:
    """Which job, round and attempt a device holds."""
    if not isinstance(value, Mapping):
        raise ProtocolError(where, expected="an object with job, round and attempt", got=shown(value))
    checks: dict[str, Check] = {"job": job, "round": whole(), "attempt": whole()}
    for key in checks:
        if key not in value:
            raise ProtocolError(f"{where}.{key}", expected="a value", got="nothing")
    return {key: check(f"{where}.{key}", value[key]) for key, check in checks.items()}


def _plain(where: str, value: object, depth: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return whole(-MAX_INT)(where, value)
    if isinstance(value, float):
        return number()(where, value)
    if isinstance(value, str):
        return text(65_536)(where, value)
    if depth <= 1:
        raise ProtocolError(where, expected=f"at most {MAX_DEPTH} levels", got="more")
    if isinstance(value, (list, tuple)):
        return [_plain(where, item, depth - 1) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(where, item, depth - 1) for key, item in _keys(where, value)}
    raise ProtocolError(where, expected="a JSON value", got=shown(value))


def _keys(where: str, value: Mapping[Any, object]) -> list[tuple[str, object]]:
    rows = []
    for key, item in value.items():
        if not isinstance(key, str) or len(key) > 256:
            raise ProtocolError(f"{where}: key", expected="text of at most 256 characters", got=shown(key))
        rows.append((text(256)(f"{where}: key", key), item))
    return rows

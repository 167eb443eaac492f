"""Partial sums as bytes: what an aggregator hands to the server that closes the round."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from fedprune.aggregation.fixed_point import MAX_WEIGHT
from fedprune.aggregation.update_sums import Key, PartialSums, Whole
from fedprune.core import tensorfile
from fedprune.core.errors import BundleError
from fedprune.model.architecture import Architecture
from fedprune.model.selection import Selection

_FORMAT = "fedprune.sums/1"
_ABOUT = "about"
_KINDS = ("value", "moved", "square")


def encode(sums: PartialSums) -> bytes:
    """The bytes of partial sums."""
    about = {
        "format": _FORMAT,
        "layout": sums.layout.to_json(),
        "shares": [[selection.to_json(), weight] for selection, weight in sums.shares],
        "updates": sums.updates,
        "names": sorted(sums.names),
    }
    text = json.dumps(about, separators=(",", ":")).encode()
    text += b" " * (-len(text) % tensorfile.ALIGN)  # what follows keeps its alignment
    arrays = {f"{kind}/{limb}/{name}": value for (kind, name, limb), value in sums.arrays.items()}
    return tensorfile.encode({_ABOUT: np.frombuffer(text, np.uint8), **arrays})


def decode(raw: bytes | memoryview, architecture: Architecture) -> PartialSums:
    """Read what `encode` wrote. Whether the arrays have a round's shapes is checked where they are added.

    Raises:
        BundleError: The bytes are damaged, or of another architecture.
    """
    tensors = tensorfile.decode(raw)
    try:
        about: dict[str, Any] = json.loads(tensors.pop(_ABOUT).tobytes())
        if about["format"] != _FORMAT:
            raise BundleError("format of partial sums", expected=_FORMAT, got=repr(about["format"])[:80])
        shares = tuple((Selection.from_json(s, architecture), _weight(w)) for s, w in about["shares"])
        layout = Selection.from_json(about["layout"], architecture)
        return PartialSums(
            frozenset(map(str, about["names"])),
            layout,
            shares,
            _weight(about["updates"]),
            dict(_array(name, value) for name, value in tensors.items()),
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise BundleError(f"partial sums are damaged ({type(error).__name__})") from error


def _weight(number: object) -> int:
    if type(number) is not int or not 0 < number <= MAX_WEIGHT:
        raise BundleError("weight of partial sums", expected=f"from 1 to {MAX_WEIGHT}", got=repr(number)[:80])
    return number


def _array(name: str, value: Any) -> tuple[Key, Whole]:
    kind, limb, tensor = name.split("/", 2)
    if kind not in _KINDS or not limb.isdigit():
        raise BundleError("partial sums", expected=f"arrays of {', '.join(_KINDS)}", got=name[:80])
    return (kind, tensor, int(limb)), value

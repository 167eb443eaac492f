"""Digests of the blobs that parts of a job's state refer to: a blob that nothing refers to is deleted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def update_digests(update: Mapping[str, Any] | None) -> set[str]:
    """Digests of the blobs that a stored update refers to itself: a `LastCountedUpdate` or `Contribution`, as JSON."""
    return {update[k] for k in ("weights", "ranking", "mask", "sent") if update.get(k)} if update else set()


def offer_digests(offer: Mapping[str, Any]) -> set[str]:
    """Digests of the blobs that an offer names: in a field of their own, in a list, or in a table, as by precision."""
    references = [v for v in offer.values() if isinstance(v, dict)]
    references += [v for named in references for v in named.values() if isinstance(v, dict)]
    references += [v for entry in offer.values() if isinstance(entry, list) for v in entry if isinstance(v, dict)]
    return {v["sha256"] for v in references if isinstance(v.get("sha256"), str)}


def basis_digests(basis: Mapping[str, Any] | None) -> set[str]:
    """Digests of the blobs that a part was cut from: `Basis`, as attributes or JSON."""
    if not basis:
        return set()
    return {d for d in (basis["model"], basis["ranking"], basis["order"], *basis["memory"].values()) if d}


def contribution_digests(update: dict[str, Any] | None) -> set[str]:
    """Digests of the blobs that a kept contribution refers to."""
    if update is None:
        return set()
    return update_digests(update) | basis_digests(update["basis"]) | update_digests(update["part"]["past"])

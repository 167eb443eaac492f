"""Blobs that a job needs no more, and when it is safe to delete them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.jobs.change_tracking import TrackedDict
from fedprune.jobs.state import named_in
from fedprune_server.executor.offers import LatestGraphs, graphs_of


class Garbage:
    """What rounds leave behind.

    Args:
        store: The blob store.
        keep: How many of the latest global models stay; None for everything.
    """

    def __init__(self, store: BlobStore, keep: int | None) -> None:
        self._store = store
        self._keep = keep
        self._suspects: set[str] = set()
        self._graphs = LatestGraphs()
        self._held: dict[tuple[int, str], set[str]] = {}

    def follow(self, state: State) -> None:
        """Suspect what the state no longer refers to; it is asked before the state's changes are settled."""
        if self._keep is None:
            return
        known = bool(self._held)
        self._hold((0, ""), state.own_references())
        for floor, roll in enumerate[TrackedDict[Any]]((state.devices, state.tasks), 1):
            for name in roll.changed if known else list(roll):
                self._hold((floor, name), roll[name].references() if name in roll else set())

    def _hold(self, key: tuple[int, str], digests: set[str]) -> None:
        before = self._held.pop(key, set())
        if digests:
            self._held[key] = digests
        self._suspects |= before - digests

    def suspect(self, digests: Iterable[str]) -> None:
        """Blobs that something no longer refers to; something else still may."""
        if self._keep is not None:
            self._suspects |= set(digests)

    def spare(self, graphs: Iterable[str], round_: int) -> None:
        """Graphs that an offer of a round names; those of the next rounds may name them again.

        They stay as long as `LatestGraphs` has them.
        """
        self._graphs.name(graphs, round_)

    def made(self, offer: Mapping[str, Any], round_: int) -> None:
        """An offer was made of a round; its device may have been let go meanwhile, and nothing refer to it."""
        self.spare(graphs_of(offer), round_)
        self.suspect(named_in(offer) | ({offer["ranking"]} if offer.get("ranking") else set()))

    def collect(self, state: State, arriving: AbstractSet[str]) -> None:
        """Delete what earlier rounds needed.

        Only as a round begins, before any of its commands is carried out: then no offer is being made, so nobody is
        about to name what is deleted here, or to put the same bytes again. Parts that wait for their offers are the new
        round's, and name what it needs.

        Args:
            state: What it refers to stays.
            arriving: Blobs on their way here, which stay; parts of all others are deleted.

        Raises:
            StorageError: The disk fails.
        """
        self.suspect(self._graphs.let_go(state.round))
        kept = state.references() | self._graphs.digests() | kept_models(state, self._keep)
        kept |= arriving
        for digest in self._suspects - kept:
            self._store.delete(digest)
        self._suspects &= kept
        self._store.drop_partials(arriving)


def kept_models(state: State, keep: int | None) -> set[str]:
    """Digests of the latest global models that stay on the disk; of all without `keep`."""
    return {state.model, *(r["model"] for r in state.history[-(keep or 0) :])}


def sweep(store: BlobStore, state: State, keep: int | None) -> None:
    """Delete blobs, whole and partial, that nothing refers to: what a crash left behind.

    Graphs are made again when they are needed. Without `keep` everything stays.

    Raises:
        StorageError: The disk fails.
    """
    updates = {t.update["sha256"] for t in state.tasks.values() if t.update}
    kept = state.references() | kept_models(state, keep) | updates
    for digest in store.names() if keep is not None else ():
        if digest not in kept:
            store.delete(digest)
    store.drop_partials(updates)


def texts(value: object) -> set[str]:
    """Every text in JSON types: all that may be a digest."""
    if isinstance(value, str):
        return {value}
    if isinstance(value, Mapping):
        return set().union(*map(texts, value.values()))
    if isinstance(value, (list, tuple)):
        return set().union(*map(texts, value))
    return set()

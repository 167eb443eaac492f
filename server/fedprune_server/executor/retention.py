"""Garbage collection of blobs: which blobs a job no longer needs, and when it is safe to delete them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.jobs.change_tracking import TrackedDict
from fedprune_server.executor.offer_entries import blobs_of_offer, offer_graphs

# Rounds after which a graph that no offer names is dropped; it is made again when it is needed.
GRAPH_ROUNDS = 10


class LatestGraphs:
    """The graphs that recent offers name, which are kept: the executor may offer them again.

    A graph that any offer names counts as named in the latest round, even if the offer belongs to an earlier round.
    """

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self._round = 0

    def note_named(self, graphs: Iterable[str], round_: int) -> None:
        """Note the digests of graphs that an offer of a round names."""
        self._round = max(self._round, round_)
        self._last |= dict.fromkeys(graphs, self._round)

    def drop_unnamed(self, round_: int) -> set[str]:
        """Drop graphs that no offer has named for `GRAPH_ROUNDS` rounds before this one. Returns their digests."""
        self._round = max(self._round, round_)
        unnamed = {g for g, last in self._last.items() if last < self._round - GRAPH_ROUNDS}
        for digest in unnamed:
            del self._last[digest]
        return unnamed

    def digests(self) -> set[str]:
        """Digests of the graphs that were named and not dropped."""
        return set(self._last)


class BlobCollector:
    """Mark and sweep of a job's blobs: candidates are marked while a round runs, and swept when the next one begins.

    A blob becomes a candidate when one of its references is removed. `collect` deletes the candidates without any other
    reference; the others stay candidates. The latest `keep` global models stay, and the best by the metric
    `judged_by`."""

    def __init__(self, store: BlobStore, keep: int, judged_by: str) -> None:
        self._store = store
        self._keep = keep
        self._judged_by = judged_by
        self._candidates: set[str] = set()
        self._graphs = LatestGraphs()
        self._references: dict[tuple[str, str], set[str]] = {}  # by kind ("state", "device", "task") and name
        self._uses = Counter[str]()  # how many of these refer to a blob

    def note_state(self, state: State) -> None:
        """Mark what the state no longer refers to. Call it before `State.mark_saved()`, which forgets the changes."""
        has_references = bool(self._references)
        self._note_references("state", "", state.state_references())
        entries: tuple[tuple[str, TrackedDict[Any]], ...] = (("device", state.devices), ("task", state.tasks))
        for kind, tracked in entries:
            # After a start nothing is noted yet; from then on only what a turn has changed, as a fleet may have
            # thousands of devices.
            for name in tracked.changed if has_references else list(tracked):
                self._note_references(kind, name, tracked[name].references() if name in tracked else set())

    def _note_references(self, kind: str, name: str, digests: set[str]) -> None:
        previous_digests = self._references.pop((kind, name), set())
        if digests:
            self._references[kind, name] = digests
        self._uses.update(digests - previous_digests)
        for digest in previous_digests - digests:
            self._candidates.add(digest)
            self._uses[digest] -= 1
            if not self._uses[digest]:
                del self._uses[digest]

    def mark(self, digests: Iterable[str]) -> None:
        self._candidates |= set(digests)

    def keep_graphs(self, graphs: Iterable[str], round_: int) -> None:
        """Keep the graphs of an offer while `LatestGraphs` has them: the next rounds may offer them again."""
        self._graphs.note_named(graphs, round_)

    def note_offer(self, offer: Mapping[str, Any], round_: int) -> None:
        """Keep a new offer's graphs, and mark its other blobs: its device may have been dropped while it was made."""
        self.keep_graphs(offer_graphs(offer), round_)
        self.mark(blobs_of_offer(offer))

    def collect(self, state: State, arriving: AbstractSet[str]) -> None:
        """Sweep: delete the candidates without a reference, and partial files, except those of blobs that are arriving.

        Call it only when a round begins, before any of its commands is carried out. No offer is being made then, so
        nothing can start to refer to a blob that is deleted here, or store the same bytes again. Tasks that wait for
        their offers belong to the new round, and refer to what it needs. Raises `StorageError` if the disk fails."""
        self.note_state(state)
        self.mark(self._graphs.drop_unnamed(state.round))
        models = kept_models(state, self._keep, self._judged_by)
        self.mark(models)  # those from before a restart, too, which no later state lets go of
        needed = {d for d in self._candidates if d in self._uses}
        needed |= self._graphs.digests() | models | arriving
        for digest in self._candidates - needed:
            self._store.delete(digest)
        self._candidates &= needed
        self._store.drop_partials(arriving)


def kept_models(state: State, keep: int, judged_by: str) -> set[str]:
    """Digests of the global models that stay on the disk: the latest `keep`, and the best by evaluation."""
    best_round = state.best_round(judged_by)
    rows = [*state.history[-keep:], *(() if best_round is None else (best_round,))]
    return {state.model, *(row["model"] for row in rows)}


def sweep_blobs(store: BlobStore, state: State, keep: int, judged_by: str) -> None:
    """Delete all blobs, whole and partial, that nothing refers to, such as a crash leaves behind.

    Graphs are made again when they are needed. Raises `StorageError` if the disk fails."""
    updates = {t.update["sha256"] for t in state.tasks.values() if t.update}
    needed = state.references() | kept_models(state, keep, judged_by) | updates
    for digest in store.names():
        if digest not in needed:
            store.delete(digest)
    store.drop_partials(updates)

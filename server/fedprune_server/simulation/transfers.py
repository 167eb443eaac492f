"""Transfers of a simulation: which bytes an offer or update takes over the virtual links, and when they arrive."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedprune.blobs.blob_ref import BlobRef, leaf_digests
from fedprune.blobs.blob_store import BlobStore
from fedprune_server.executor.offer_entries import UPDATE_BOUND, UPDATE_SIZE, update_misfit
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
from fedprune_server.simulation.network_model import Weather, cached_transfer_end, transfer_end
from fedprune_server.simulation.state import DOWN, UP, SimulationState

# Leaf tables in memory: devices have the weights of this round or the one before, of a few widths.
_MAX_LEAF_TABLES = 32

_BLOB_ENTRIES = ("weights", "training", "inference", "base")  # entries of an offer that refer to blobs


def download_sizes(offer: Mapping[str, Any], held_digests: Collection[str]) -> dict[str, int]:
    """Bytes that a board downloads for an offer, by the digest of each blob.

    `held_digests` are those of blobs that the board has already; weights that it can decode with them travel encoded.
    """
    refs = [offer[k] for k in (*_BLOB_ENTRIES, "mask", "drift", "moved") if offer.get(k)]
    sizes, encoded = {r["sha256"]: int(r["size"]) for r in refs}, offer.get("coded")
    weights = offer["weights"]["sha256"]
    if encoded and offer.get("held", encoded["sha256"]) in (*held_digests, encoded["sha256"]):
        # Encoded weights need the board's old ones; a board without them fetches the plain file.
        sizes[weights] = int(encoded["size"])
    elif offer.get("increments") and weights not in held_digests:
        replaced = {weights, *([offer["mask"]["sha256"]] if offer.get("mask") else [])}
        sizes = {sha256: size for sha256, size in sizes.items() if sha256 not in replaced}
        sizes |= {r["sha256"]: int(r["size"]) for r in offer["increments"]}
    return sizes


class Transfers:
    """The transfers of one run, whose state has what each device holds and when the server's link is free."""

    def __init__(self, weather: Weather, seed: int, store: BlobStore, run: SimulationState) -> None:
        self._weather, self._seed, self._store, self._run = weather, seed, store, run
        # Many devices are sent the same weights in turn: the leaf table of the last ones is stored once. It stays in
        # the store, because the last device's state refers to it.
        self._last_table = ("", "")
        self._leaves: dict[str, list[bytes]] = {}

    def download(self, device: VirtualDevice, offer: Mapping[str, Any], number: int) -> float:
        """Send a device what it lacks of a round's offer; returns when the last byte arrives."""
        name, run = device.name, self._run
        run.sizes[name] = int(offer.get(UPDATE_SIZE, offer["weights"]["size"]))
        run.bounds.pop(name, None)
        if UPDATE_BOUND in offer:
            run.bounds[name] = int(offer[UPDATE_BOUND])
        held_digests, weights = run.held.get(name, []), BlobRef.from_dict(offer["weights"])
        downloads = download_sizes(offer, held_digests)
        missing = {sha256: n for sha256, n in downloads.items() if sha256 not in held_digests}
        if reused_bytes := self._reused_bytes(name, weights, downloads, held_digests):
            # Boards fetch leaves of 32 KiB, and copy those that they have.
            missing[weights.sha256] -= reused_bytes
        # A board keeps the files that increments make.
        run.held[name] = list(download_sizes({k: v for k, v in offer.items() if k != "increments"}, held_digests))
        run.down += sum(missing.values())
        return self._transfer(device, number, DOWN, missing)

    def misfit(self, device: str, ref: BlobRef) -> str:
        """Why an announced update can't be the one that the device was asked for; empty if it can."""
        run = self._run
        return update_misfit({UPDATE_SIZE: run.sizes.get(device, ref.size), UPDATE_BOUND: run.bounds.get(device)}, ref)

    def upload(self, device: VirtualDevice, number: int, ref: BlobRef) -> float:
        """Receive a device's update of a round; returns when the last byte arrives."""
        self._run.up += ref.size
        return self._transfer(device, number, UP, {ref.sha256: ref.size})

    def _transfer(self, device: VirtualDevice, number: int, direction: int, sizes: Mapping[str, int]) -> float:
        run, size, link, weather = self._run, sum(sizes.values()), device.profile.link, self._weather
        run.device_costs(device.name)[direction] += size
        rate, limit = weather.rates(self._seed, number, device.name, link, "down" if direction == DOWN else "up")
        if direction == DOWN and weather.server_cache:
            arrives_at, run.free[DOWN] = cached_transfer_end(run.clock, run.free[DOWN], sizes, rate, limit, run.cached)
        else:
            arrives_at, run.free[direction] = transfer_end(run.clock, run.free[direction], size, rate, limit)
        return arrives_at + link.delay_s

    def _reused_bytes(
        self, name: str, weights: BlobRef, downloads: Mapping[str, int], held_digests: Sequence[str]
    ) -> int:
        """Bytes of the leaves that a device's new weights share with its last ones: a board copies them."""
        if weights.sha256 in held_digests or downloads.get(weights.sha256) != weights.size:
            return 0
        if self._last_table[0] != weights.sha256:
            self._last_table = weights.sha256, self._store.put(self._store.table(weights.sha256)).sha256
        previous_table, table = self._run.tables.get(name), self._last_table[1]
        self._run.tables[name] = table
        previous_leaves = set() if previous_table is None else set(self._leaves_of(previous_table))
        return sum(weights.leaf_size(i) for i, d in enumerate(self._leaves_of(table)) if d in previous_leaves)

    def _leaves_of(self, table: str) -> list[bytes]:
        """The leaves in a stored leaf table."""
        if table not in self._leaves:
            if len(self._leaves) >= _MAX_LEAF_TABLES:
                self._leaves.clear()
            self._leaves[table] = leaf_digests(self._store.read(table))
        return self._leaves[table]

"""The slabs of a round, from which its devices put their submodels together.

A *chain* is a series of submodels from narrow to wide in which each holds the one before. A *slab* is what a submodel
of a chain has and the one before has not (the first slab is the narrowest submodel itself), so that slabs 1 to j make
up the j-th submodel. `fedprune.updates.width_deltas` has the format. Every slab is made and stored once, and the offers
of all devices that need it name it.

`SlabChains.expect` takes in a round's commands to extract submodels; `SlabChains.named` makes the slabs when the first
offer needs them, and returns an offer's entry with the references to its slabs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import commands as do
from fedprune.core import tensorfile
from fedprune.model.element_mask import ElementMask
from fedprune.model.selection import Selection, Tensors
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Submodel
from fedprune.updates import Codec
from fedprune.updates.width_deltas import chains, own_share, places, slab

LEAST = 256 * 1024
"""Bytes of a round's largest submodel below which no slabs are made: the saving isn't worth the longer offers."""

MOST_OWN = 0.5
"""A submodel of which its slab would hold more than this share as whole tensors begins a chain of its own."""

_ROUNDS = 2
"""Rounds that are remembered: an offer may be made once more after the next round has begun to be expected."""

_Basis = tuple[int, str, str, str | None]
_Kind = tuple[tuple[int, ...], float]


@dataclass(frozen=True)
class _Link:
    """A submodel in its chain."""

    weights: str
    slabs: tuple[dict[str, Any], ...]


@dataclass(frozen=True, eq=False)
class _Below:
    """The submodel that the next one of a chain is compared with."""

    selection: Selection
    mask: ElementMask | None
    packed: Tensors


class SlabChains:
    """Makes slabs of what a round's devices are sent.

    Slabs need two things. What a device is sent may depend on its widths and density alone, not on the device. And all
    submodels of the round must be known before the first is made, because a wider one is made of narrower ones. If they
    are not known, as after a restart in the middle of a round, the remaining devices get slabs of their own or none; an
    offer without slabs is as good as one with them. Devices get none if their weights are encoded with a loss, because
    that loss depends on what each device holds.

    Args:
        strategy: Says whether devices are sent the same.
        make: Makes a submodel.
        least: Bytes of a round's largest submodel from which on slabs are made.
    """

    def __init__(
        self, strategy: Strategy, store: BlobStore, make: Callable[[do.Extract], Submodel], least: int = LEAST
    ) -> None:
        self._device_independent = strategy.device_independent
        self._store = store
        self._make = make
        self._least = least
        self._expected: dict[_Basis, list[do.Extract]] = {}
        self._links: dict[_Basis, tuple[list[do.Extract], dict[_Kind, _Link]]] = {}

    def expect(self, commands: Iterable[do.Command]) -> None:
        """Note which submodels will be made; this may be called while another thread makes one."""
        if not self._device_independent:
            return
        rounds: dict[_Basis, list[do.Extract]] = {}
        for command in commands:
            if isinstance(command, do.Extract) and _whole(command.coding):
                rounds.setdefault(basis_of(command), []).append(command)
        for basis, extracts in rounds.items():
            if len(extracts) > 1:
                self._expected = dict([*self._expected.items(), (basis, extracts)][-_ROUNDS:])

    def named(self, command: do.Extract, weights: str) -> dict[str, Any]:
        """The entry of an offer with the slabs that make a device's weights, in ascending order, if there are any.

        Args:
            weights: Digest of its weights.

        Raises:
            StorageError: The disk fails or is full.
        """
        basis = basis_of(command)
        expected = self._expected.get(basis)
        if expected is None:
            return {}
        made = self._links.get(basis)
        if made is None or made[0] is not expected or not self._kept(made[1].get(kind_of(command))):
            made = expected, self._made(expected)
            self._links = dict([*((b, m) for b, m in self._links.items() if b != basis), (basis, made)][-_ROUNDS:])
        link = made[1].get(kind_of(command))
        return {"slabs": list(link.slabs)} if link is not None and link.weights == weights else {}

    def _kept(self, link: _Link | None) -> bool:
        """Whether nothing of a link was deleted meanwhile."""
        return link is None or all(self._store.has(ref["sha256"]) for ref in link.slabs)

    def _made(self, expected: Sequence[do.Extract]) -> dict[_Kind, _Link]:
        kinds = {kind_of(c): c for c in expected}
        shapes = self._make(expected[0]).selection.architecture.shapes
        sizes = {k: 4 * sum(math.prod(s) for s in shapes(k[0]).values()) for k in kinds}
        if max(sizes.values()) < self._least:
            return {}
        order = sorted(kinds, key=lambda k: (sizes[k], k[1], k[0]))
        devices = Counter(kind_of(c) for c in expected)
        links: dict[_Kind, _Link] = {}
        for chain in chains([widths for widths, _ in order]):
            members = [order[i] for i in chain]
            if sum(devices[k] for k in members) > 1:
                links |= self._chain([(k, kinds[k]) for k in members])
        return links

    def _chain(self, members: Sequence[tuple[_Kind, do.Extract]]) -> dict[_Kind, _Link]:
        """The links of submodels that hold each other."""
        links: dict[_Kind, _Link] = {}
        below: _Below | None = None
        for kind, command in members:
            submodel = self._make(command)
            mask, tensors = submodel.mask, submodel.tensors
            here = _Below(submodel.selection, mask, tensors if mask is None else mask.pack(tensors))
            ref = self._store.put(tensorfile.encode(here.packed)).to_dict()
            last = next(reversed(links.values()), None)
            if last is not None and last.weights == ref["sha256"]:
                links[kind] = last
                continue
            slabs: tuple[dict[str, Any], ...] = (ref,)
            if below is not None and last is not None:
                entries = slab(below.packed, here.packed, places(below.selection, here.selection, below.mask, mask))
                if own_share(entries, here.packed) <= MOST_OWN:
                    slabs = (*last.slabs, self._store.put(tensorfile.encode(entries)).to_dict())
            links[kind], below = _Link(ref["sha256"], slabs), here
        return links


def basis_of(command: do.Extract) -> _Basis:
    """Identifies what the submodels of a round are cut from."""
    basis = command.basis
    return basis.round, basis.model, basis.ranking, basis.order


def kind_of(command: do.Extract) -> _Kind:
    """The key of a device's submodel; its density counts where single elements are masked alone."""
    part = command.part
    return part.widths, part.density if command.basis.order is not None else 1.0


def _whole(coding: do.Coding) -> bool:
    """Whether a device has the very weights that were made for it once it has decoded them."""
    codec = None if coding.weights is None else Codec.parse(coding.weights)
    return codec is None or codec.name == "zlib"

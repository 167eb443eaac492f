"""Cached reads of the blob store: models, rankings, memories and updates."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import commands as do
from fedprune.core import tensorfile
from fedprune.core.errors import BundleError, value_text
from fedprune.model import step_contract
from fedprune.model.architecture import Architecture
from fedprune.model.element_mask import mask_from_bits, unpack_active
from fedprune.model.selection import ALL_ACTIVE, ElementMask, Selection, Tensors
from fedprune.strategies.values import PastUpdate
from fedprune.updates import Codec, decode, is_packed

T = TypeVar("T")

# Models, and orders of elements, that are kept in memory: asynchronous updates go back to a few earlier ones.
_MAX_MODELS = 3

_MAX_RANKINGS = 8

_SQUARES_SUFFIX = step_contract.squares_name("")


class Archive:
    """Reads what a job has stored, and keeps the last few models, rankings and selections in memory."""

    def __init__(self, architecture: Architecture, store: BlobStore) -> None:
        self._architecture = architecture
        self._store = store
        self._models: OrderedDict[str, Tensors] = OrderedDict()
        self._orders: OrderedDict[str, Tensors] = OrderedDict()
        self._sent_weights: OrderedDict[str, Tensors] = OrderedDict()
        self._rankings: OrderedDict[str, dict[tuple[int, ...], Selection]] = OrderedDict()

    def model(self, digest: str) -> Tensors:
        """A global model. Raises `StorageError` if the blob isn't there or is damaged, and `BundleError` if it isn't a
        tensor file."""
        return _read_cached(self._models, digest, _MAX_MODELS, self.tensors)

    def order(self, digest: str | None) -> Tensors | None:
        """An order of elements; errors are those of `model`."""
        return None if digest is None else _read_cached(self._orders, digest, _MAX_MODELS, self.tensors)

    def tensors(self, digest: str) -> dict[str, npt.NDArray[Any]]:
        """A tensor file, as views on it; errors are those of `model`."""
        return tensorfile.decode(self._store.map(digest))

    def sent_weights(self, digest: str) -> dict[str, npt.NDArray[Any]]:
        """Weights that devices were sent, often several devices the same; errors are those of `model`."""
        return _read_cached(self._sent_weights, digest, _MAX_MODELS, self.tensors)

    def update(self, digest: str, codec: str | None, sent: str | None) -> dict[str, npt.NDArray[Any]]:
        """A device's update, decoded. Though a `codec` was offered, the device may have sent it plainly. With a codec,
        `sent` is the digest of the weights that the device was sent.

        Raises:
            StorageError: A blob isn't there or is damaged.
            BundleError: It isn't a tensor file.
            ProtocolError: It isn't what its codec makes of an update of these weights.
        """
        # Not mapped: in a mapping a page that can't be read ends the process. Up to 1 MB reading is also the quicker.
        raw = self._store.read(digest)
        parsed_codec = None if codec is None else Codec.parse(codec)
        if parsed_codec is None or sent is None or not is_packed(raw):
            return tensorfile.decode(raw)
        trained = frozenset(t.name for t in self._architecture.trainable)
        return dict(decode(parsed_codec, raw, self.sent_weights(sent), trained))

    def selection(self, ranking: str, widths: tuple[int, ...]) -> Selection:
        """The first channels of a ranking; boards of equal width share one, with its maps. Raises `StorageError` if the
        blob isn't there or is damaged; and `BundleError` if it isn't a ranking, or the widths don't fit."""
        selections = _read_cached(self._rankings, ranking, _MAX_RANKINGS, self._read_ranking)
        if widths not in selections:
            selections[widths] = selections[self._architecture.sizes].with_widths(widths)
        return selections[widths]

    def _read_ranking(self, digest: str) -> dict[tuple[int, ...], Selection]:
        ranking = Selection.from_json(self._store.read(digest), self._architecture)
        return {self._architecture.sizes: ranking.with_widths(self._architecture.sizes)}

    def mask(self, digest: str | None, selection: Selection) -> ElementMask:
        """An element mask of a submodel; errors are those of `model`."""
        if digest is None:
            return ALL_ACTIVE
        return mask_from_bits(tensorfile.decode(self._store.read(digest)), selection.shapes())

    def past(self, past: do.LastCountedUpdate | None, withheld: Callable[[Selection], Tensors]) -> PastUpdate | None:
        """A device's last counted update. `withheld` gives the tensors of a submodel that no update carries."""
        if past is None:
            return None
        selection = self.selection(past.ranking, past.widths)
        mask = self.mask(past.mask, selection)
        tensors, _ = split_update(self.update(past.weights, past.codec, past.sent), mask)
        return PastUpdate(selection, tensors | withheld(selection), mask, past.round)

    def memory(self, digests: Mapping[str, str]) -> Mapping[str, Mapping[str, npt.NDArray[Any]]]:
        """A job's memory, whose collections are read on demand."""
        return _Memory(self, digests)


def split_update(update: Mapping[str, npt.NDArray[Any]], mask: ElementMask) -> tuple[Tensors, Tensors]:
    """The trained tensors of an update, and its squared gradients, both as large as the submodel. Raises `BundleError`
    if an update of a masked submodel has another number of values than the mask has active elements, or values of
    another type than float32."""
    trained = {n: v for n, v in update.items() if not n.endswith(_SQUARES_SUFFIX)}
    squares = {n.removesuffix(_SQUARES_SUFFIX): v for n, v in update.items() if n.endswith(_SQUARES_SUFFIX)}
    if not mask:
        return trained, squares  # as they came: `fedprune.aggregation.client_update` checks them
    for name, value in update.items():
        if value.dtype != np.float32:
            raise BundleError(f"type of {value_text(name)}", expected="float32", got=value.dtype)
    return unpack_active(mask, trained), unpack_active(mask, squares)


class _Memory(Mapping[str, Mapping[str, npt.NDArray[Any]]]):
    def __init__(self, archive: Archive, digests: Mapping[str, str]) -> None:
        self._archive = archive
        self._digests = dict(digests)

    def __getitem__(self, name: str) -> Mapping[str, npt.NDArray[Any]]:
        return self._archive.tensors(self._digests[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._digests)

    def __len__(self) -> int:
        return len(self._digests)


def _read_cached(cache: OrderedDict[str, T], digest: str, max_entries: int, read: Callable[[str], T]) -> T:
    """An entry of a small cache; the one that was used least lately makes room."""
    if digest not in cache:
        cache[digest] = read(digest)
        while len(cache) > max_entries:
            cache.popitem(last=False)
    cache.move_to_end(digest)
    return cache[digest]

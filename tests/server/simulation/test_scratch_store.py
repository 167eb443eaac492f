"""A simulation's blobs: hashed once, verified where another run wrote them."""

from copy import copy
from pathlib import Path

import numpy as np
import pytest

from fedprune.blobs.blob_ref import LEAF_BYTES, BlobRef, leaf_table
from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import StorageError, StorageFullError
from fedprune_server.simulation.results.run_folder import ScratchStore

DATA = np.random.default_rng(0).bytes(2 * LEAF_BYTES + 7)


def test_its_files_are_those_of_any_store(tmp_path: Path) -> None:
    store = ScratchStore(tmp_path)
    ref = store.put(DATA)
    assert (ref.sha256, ref.size) == (BlobRef.of(DATA).sha256, len(DATA))
    assert store.put(DATA) == BlobRef.from_dict(ref.to_dict()) == ref
    assert store.put(b"small") == BlobRef.of(b"small")
    for there in (store, copy(store), BlobStore(tmp_path)):
        assert there.read(ref.sha256) == bytes(there.map(ref.sha256)) == DATA
        assert there.table(ref.sha256) == leaf_table(DATA)
        assert there.ref(ref.sha256) == BlobRef.of(DATA)


def test_what_an_earlier_run_left_is_verified(tmp_path: Path) -> None:
    store = ScratchStore(tmp_path)
    ref = store.put(DATA)
    store.path(ref.sha256).write_bytes(DATA[::-1])
    assert store.read(ref.sha256) == DATA[::-1]  # no other process writes there
    later = ScratchStore(tmp_path)
    for there in (later, copy(later)):
        with pytest.raises(StorageError, match="damaged"):
            there.read(ref.sha256)
        with pytest.raises(StorageError, match="damaged"):
            there.map(ref.sha256)


def test_a_file_cut_short_is_written_again_and_limits_hold(tmp_path: Path) -> None:
    store = ScratchStore(tmp_path)
    ref = store.put(DATA)
    store.path(ref.sha256).write_bytes(DATA[:5])
    assert store.put(DATA) == ref
    assert store.read(ref.sha256) == DATA
    store.reserve = 2**60
    assert store.put(DATA) == ref
    with pytest.raises(StorageFullError):
        store.put(b"more")

"""What an archive reads of a job's store."""

from pathlib import Path

import numpy as np

from fedprune.blobs.blob_store import BlobStore
from fedprune.core import tensorfile
from fedprune.model.architecture import Architecture
from fedprune_server.executor.archive import Archive


def test_an_update_is_in_memory_and_needs_its_file_no_longer(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    tensors = {"w": np.arange(1000, dtype=np.float32)}
    digest = store.put(tensorfile.encode(tensors)).sha256
    update = Archive(Architecture("net", (), (), (), (), (1,), (1,)), store).update(digest, None, None)
    # A mapping would show this, and would end the process where the page can't be read any longer.
    with store.path(digest).open("r+b") as file:
        file.write(b"\0" * store.size(digest))
    assert np.array_equal(update["w"], tensors["w"])

"""Sums that are split by tensors, by updates, or both, come together to the same bits."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.aggregation.fold import Fold
from fedprune.aggregation.update_sums import tensor_blocks
from fedprune.blobs.blob_ref import LEAF_BYTES
from fedprune.blobs.blob_store import BlobStore
from fedprune.blobs.tensor_reader import read_tensors
from fedprune.core import tensorfile
from fedprune.core.errors import BundleError, FedpruneError, StorageError
from fedprune.model.architecture import Architecture, Axis, ChannelGroup, Segment, TensorKind, TensorSpec
from fedprune.model.selection import Selection, Tensors
from support.nets.drawn_models import Update, model, rounds

pytestmark = pytest.mark.board


@given(rounds(), st.integers(1, 4), st.integers(0, 5), st.booleans())
@settings(max_examples=40)
def test_any_split_gives_the_bits_of_one_fold(
    case: tuple[Architecture, Tensors, list[Update]], block_size: int, cut: int, evidence: bool
) -> None:
    architecture, base, updates = case
    single_fold = Fold(architecture, base, evidence=evidence)
    for update in updates:
        single_fold.add(*update)
    joined = Fold(architecture, base, evidence=evidence)
    for some in (updates[:cut], updates[cut:]):
        if some:
            partial_sums = []
            for names in tensor_blocks(joined.shared, block_size, 1):
                block_fold = joined.narrow_to(names)
                for selection, tensors, weight, steps in some:
                    block_fold.add(selection, {n: v for n, v in tensors.items() if n in names}, weight, steps)
                partial_sums.append(block_fold.partial_sums())
            joined.add_partial_sums(partial_sums)
    assert joined.weight == single_fold.weight
    assert joined.updates == single_fold.updates
    expected, got = single_fold.close(0.5), joined.close(0.5)
    for mine, theirs in zip(expected, got, strict=True):
        assert mine is not None
        assert theirs is not None
        assert {n: v.tobytes() for n, v in mine.items()} == {n: v.tobytes() for n, v in theirs.items()}
    if evidence:
        for spec in architecture.trainable:
            for a, b in zip(single_fold.movement(spec.name), joined.movement(spec.name), strict=True):
                assert a.tobytes() == b.tobytes()


def _case() -> tuple[Fold, Selection, Tensors]:
    axis = Axis((Segment(0, 0, 4),))
    kinds = (TensorKind.WEIGHT, TensorKind.STAT_MEAN, TensorKind.STAT_VAR)
    specs = tuple(TensorSpec(k.value, k, (axis,)) for k in kinds)
    architecture = Architecture("norm", (ChannelGroup("c", 4),), specs, (), (), (3,), (2,))
    base = model(architecture, 1)
    return Fold(architecture, base), Selection.full(architecture), base


def test_sums_that_do_not_make_up_a_round_are_refused() -> None:
    fold, selection, base = _case()
    partial_sums = []
    for names in tensor_blocks(fold.shared, 3, 1):
        block_fold = fold.narrow_to(names)
        block_fold.add(selection, base, 3)
        partial_sums.append(block_fold.partial_sums())
    heavier = fold.narrow_to(partial_sums[0].names)
    heavier.add(selection, base, 4)
    for wrong in (
        partial_sums[:2],
        [*partial_sums, partial_sums[0]],
        [heavier.partial_sums(), *partial_sums[1:]],
        [replace(partial_sums[0], arrays={}), *partial_sums[1:]],
        [
            replace(partial_sums[0], arrays={k: v.astype(np.float64) for k, v in partial_sums[0].arrays.items()}),
            *partial_sums[1:],
        ],
    ):
        with pytest.raises(BundleError):
            fold.add_partial_sums(wrong)
        assert fold.weight == fold.updates == 0
    fold.add_partial_sums(partial_sums)
    assert fold.weight == 3


def test_masked_elements_are_not_split() -> None:
    fold, selection, base = _case()
    name = fold.shared[0].name
    mask = np.ones(base[name].shape, np.bool_)
    mask.reshape(-1)[0] = False
    fold.add(selection, base, 1, mask={name: mask})
    with pytest.raises(BundleError, match="masked"):
        fold.partial_sums()


def test_of_a_large_file_only_what_is_asked_for_is_checked(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, durable=False)
    tensors = {
        f"t{k}": np.random.default_rng(k).standard_normal(3 * LEAF_BYTES // 4).astype(np.float32) for k in range(4)
    }
    ref = store.put(tensorfile.encode(tensors))
    assert {n: v.tobytes() for n, v in read_tensors(store, ref).items()} == {n: v.tobytes() for n, v in tensors.items()}
    raw = bytearray(store.path(ref.sha256).read_bytes())
    raw[-1] ^= 1
    store.path(ref.sha256).write_bytes(raw)
    loaded = read_tensors(store, ref, {"t1", "nobody"})
    assert list(loaded) == ["t1"]
    assert loaded["t1"].tobytes() == tensors["t1"].tobytes()
    with pytest.raises(StorageError, match="leaf"):
        read_tensors(store, ref, {"t3"})


@given(st.integers(0, 2**32), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_a_damaged_file_never_passes(tmp_path_factory: pytest.TempPathFactory, seed: int, kind: int) -> None:
    store = BlobStore(tmp_path_factory.mktemp("store"), durable=False)
    dice = np.random.default_rng(seed)
    tensors = {
        "a": dice.standard_normal(LEAF_BYTES // 2).astype(np.float32),
        "b": dice.standard_normal(7).astype(np.float32),
    }
    ref = store.put(tensorfile.encode(tensors))
    path = store.path(ref.sha256)
    raw = bytearray(path.read_bytes())
    at = int(dice.integers(len(raw)))
    if kind == 0:
        raw[at] ^= 1 + int(dice.integers(255))
    elif kind == 1:
        del raw[at:]
    elif kind == 2:
        raw += b"\0"
    else:
        table = path.with_name(path.name + ".leaves")
        table.write_bytes(table.read_bytes()[:-1] + b"\0")
        raw[at] ^= 1
    path.write_bytes(raw)
    with pytest.raises(FedpruneError):
        read_tensors(store, ref)

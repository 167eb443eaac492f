"""A bundle over a bundle: whatever fails and whenever, the folder holds the old one or the new one, whole."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from fedprune.core import tensorfile
from fedprune.core.disk import file_lock
from fedprune.core.errors import BundleError, BusyError, StorageError, StorageFullError
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.runtime.bundle import COMPLETE_FOLDER, FILES, MANIFEST, TRAINING, WEIGHTS, open_bundle
from fedprune.runtime.bundle_folder import check_bundle_folder, is_bundle, write_bundle
from support.faults.failing_disk import fault
from support.faults.power_cuts import EACH_KIND, TURNS, CutError, cuts, power
from support.nets.written_nets import written_net

TARGET = "raspberry-pi-5"
OLD, NEW = 0.25, 0.5
NOTES = "notes.txt"
ARCHITECTURE = written_net({"g0": 4}, {"w": ("g0", 3)}, (3,), (1,))
SELECTION = Selection.of(ARCHITECTURE, [2], [[3, 1, 0, 2]])


def export(folder: Path, rate: float, target: str = TARGET) -> None:
    """Write a bundle of which every file tells by which learning rate it is."""
    files = {
        "inference.onnx": f"fedprune weights.safetensors {rate}".encode(),
        "weights.safetensors": tensorfile.encode(SELECTION.gather({"w": np.full((4, 3), rate, np.float32)})),
        "training.onnx": f"training {rate}".encode(),
        "architecture.json": ARCHITECTURE.to_json().encode(),
        "submodel.json": SELECTION.to_json().encode(),
    }
    write_bundle(folder, files, SELECTION, Recipe(lr=rate), target)


def bundle_in(folder: Path) -> float | None:
    """Which bundle is in a folder, all of whose files belong together; None for none."""
    if not is_bundle(folder):
        return None
    bundle = open_bundle(folder)
    assert bundle.path(TRAINING).read_text() == f"training {bundle.recipe.lr}"
    assert float(tensorfile.load_tensors(bundle.path(WEIGHTS))["w"][0, 0]) == bundle.recipe.lr
    return bundle.recipe.lr


def file_names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


ALL_FILES = sorted([*FILES, MANIFEST])


def begin(folder: Path, old: bool) -> list[str]:
    """A folder with a bundle and a file of the user's, or none."""
    if old:
        with power():
            export(folder, OLD)
        (folder / NOTES).write_text("mine")
    return [NOTES] if old else []


@pytest.mark.parametrize("kind", EACH_KIND)
@pytest.mark.parametrize("old", [False, True])
def test_a_cut_at_any_operation_leaves_the_old_or_the_new_and_the_next_export_succeeds(
    tmp_path: Path, kind: str, old: bool
) -> None:
    states = set()
    before = OLD if old else None
    begin(tmp_path / "0", old)
    with power() as supply:
        export(tmp_path / "0", NEW)
    assert supply.count > 30

    for at, how in cuts(kind, supply.names):
        folder = tmp_path / str(at)
        user_files = begin(folder, old)
        with power(at, how), pytest.raises(CutError):
            export(folder, NEW)
        states.add(bundle_in(folder))
        with power():
            export(folder, NEW)
        assert bundle_in(folder) == NEW
        assert file_names(folder) == sorted([*ALL_FILES, *user_files])
        assert not old or (folder / NOTES).read_text() == "mine"
    assert states == {before, NEW}


@pytest.mark.parametrize("kind", EACH_KIND)
def test_cuts_of_the_export_that_finishes_another(tmp_path: Path, kind: str) -> None:
    begin(tmp_path / "cut", True)
    with power() as supply:
        export(tmp_path / "cut", NEW)
    first_rename = supply.names.index("rename")
    begin(tmp_path / "old", True)
    with power(first_rename + 4, "torn" if kind == TURNS else kind), pytest.raises(CutError):
        export(tmp_path / "old", NEW)
    assert bundle_in(tmp_path / "old") in (OLD, NEW)
    shutil.copytree(tmp_path / "old", tmp_path / "0")
    with power() as supply:
        export(tmp_path / "0", 1.0)

    for at, how in cuts(kind, supply.names):
        folder = Path(shutil.copytree(tmp_path / "old", tmp_path / str(at)))
        with power(at, how), pytest.raises(CutError):
            export(folder, 1.0)
        assert bundle_in(folder) in (OLD, NEW, 1.0)
        with power():
            export(folder, 1.0)
        assert bundle_in(folder) == 1.0
        assert file_names(folder) == sorted([*ALL_FILES, NOTES])


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("number", [errno.ENOSPC])
def test_a_disk_that_fails_at_any_operation(tmp_path: Path, old: bool, number: int) -> None:
    begin(tmp_path / "0", old)
    with fault(0, None) as count:
        export(tmp_path / "0", NEW)
    failed = 0

    for at in range(1, count[0] + 1):
        folder = tmp_path / str(at)
        begin(folder, old)
        before = file_names(folder) if old else None
        with fault(at, OSError(number, os.strerror(number))):
            try:
                export(folder, NEW)
            except StorageFullError:
                failed += 1
                assert (file_names(folder) if folder.exists() else None) == before
                assert bundle_in(folder) == (OLD if old else None)
            except StorageError:
                failed += 1
                assert bundle_in(folder) in (OLD if old else None, NEW)
            else:
                assert bundle_in(folder) == NEW
        with power():
            export(folder, NEW)
        assert bundle_in(folder) == NEW
        assert file_names(folder) == sorted([*ALL_FILES, *([NOTES] if old else [])])
    assert failed > 20


def test_a_disk_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    begin(tmp_path / "b", True)
    monkeypatch.setattr(os, "link", none)
    export(tmp_path / "b", NEW)
    assert bundle_in(tmp_path / "b") == NEW
    assert file_names(tmp_path / "b") == sorted([*ALL_FILES, NOTES])


def test_a_second_export_at_once_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "b"
    begin(folder, True)
    with file_lock(folder / ".bundle.lock", "", ""), pytest.raises(BusyError, match="another export writes to"):
        export(folder, NEW)
    assert bundle_in(folder) == OLD
    export(folder, NEW)
    assert file_names(folder) == sorted([*ALL_FILES, NOTES])


def test_a_symbolic_link_in_the_place_of_a_file_is_replaced_and_not_followed(tmp_path: Path) -> None:
    begin(tmp_path / "b", True)
    (tmp_path / "own").write_text("mine")
    (tmp_path / "b" / "training.onnx").unlink()
    (tmp_path / "b" / "training.onnx").symlink_to(tmp_path / "own")
    export(tmp_path / "b", NEW)
    assert bundle_in(tmp_path / "b") == NEW
    assert (tmp_path / "own").read_text() == "mine"


def test_a_folder_with_a_file_s_name_is_left_alone(tmp_path: Path) -> None:
    begin(tmp_path / "b", True)
    (tmp_path / "b" / "training.onnx").unlink()
    (tmp_path / "b" / "training.onnx").mkdir()
    before = file_names(tmp_path / "b")
    with pytest.raises(BundleError, match=r"training\.onnx is a folder"):
        export(tmp_path / "b", NEW)
    assert file_names(tmp_path / "b") == before


def test_another_board_s_bundle_that_is_not_in_its_place_yet_is_not_replaced(tmp_path: Path) -> None:
    with power() as supply:
        export(tmp_path / "a", OLD)
    with power(supply.names.index("rename") + 3), pytest.raises(CutError):
        export(tmp_path / "b", OLD)
    assert (tmp_path / "b" / COMPLETE_FOLDER).exists()
    with pytest.raises(BundleError, match="jetson"):
        export(tmp_path / "b", NEW, "jetson-orin-nano")
    assert bundle_in(tmp_path / "b") == OLD


@pytest.mark.parametrize("name", [NOTES, FILES[0]])
def test_a_folder_with_files_but_no_bundle_is_left_as_it_is(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "b"
    folder.mkdir()
    (folder / name).write_bytes(b"mine")
    with pytest.raises(BundleError, match="no bundle"):
        export(folder, NEW)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {name: b"mine"}


@pytest.mark.parametrize("inside", ["", "a/bundle"])
def test_a_file_in_the_folders_way_is_refused(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BundleError, match="file is not a folder"):
        check_bundle_folder(tmp_path / "file" / inside, TARGET)

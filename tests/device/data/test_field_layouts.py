"""Folders as the tools of the field write them: Ultralytics, Roboflow, Label Studio, LabelImg."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.core.errors import ConfigError, DataError
from fedprune_device.data.class_lists import find_class_list
from fedprune_device.data.image_decoding import Pixels
from fedprune_device.data.labels import Targets
from fedprune_device.data.sample_folder import SampleFolder
from fedprune_device.data.splits import SplitShares
from support.fakes.sample_files import image_file

pytestmark = pytest.mark.board

SHAPE = (3, 4, 5)
BOXES = Targets("custom", 7, (2, 5))
CLASSES = Targets("cross_entropy", 2)
BOX = b"1 .5 .5 .25 .5\n"
NAMES = ("ant", "bee")


def picture(seed: int) -> bytes:
    return image_file(np.full((4, 5, 3), seed, np.uint8))


def put(root: Path, files: dict[str, bytes]) -> Path:
    for name, body in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(body)
    return root


def snapshot(root: Path, targets: Targets, shares: SplitShares | None = None, names: tuple[str, ...] = NAMES) -> Any:
    data = SampleFolder(root, (Pixels(),), shares or SplitShares(0.0), 100, names).snapshot(SHAPE, targets)
    data.check(targets, SHAPE)
    return data


def seeds(x: Any) -> list[int]:
    """The pictures of samples, by the number that they were made of."""
    return sorted(round(float(one[0, 0, 0]) * 255) for one in np.asarray(x))


def boxes(data: Any) -> dict[int, list[float]]:
    """The class of the first box of each training picture, -1 for none."""
    pairs = zip(np.asarray(data.x_train), np.asarray(data.y_train), strict=True)
    return {round(float(x[0, 0, 0]) * 255): float(y[0, 0]) for x, y in pairs}


ULTRALYTICS = {
    "data.yaml": b"path: .\ntrain: images/train\nnames:\n  0: ant\n  1: bee\n",
    "images/train/a.png": picture(1),
    "labels/train/a.txt": BOX,
    "images/train/b.png": picture(2),
    "labels/train/b.txt": b"",
    "images/train/c.png": picture(3),
    "labels/train.cache": b"cache",
    "images/val/d.png": picture(4),
    "labels/val/d.txt": BOX,
}
ROBOFLOW = {
    "data.yaml": b"train: ../train/images\nnc: 2\nnames: ['ant', 'bee']\n",
    "README.roboflow.txt": b"",
    "train/images/a_jpg.rf.0.png": picture(1),
    "train/labels/a_jpg.rf.0.txt": BOX,
    "train/images/b.png": picture(2),
    "train/labels/b.txt": b"",
    "train/images/c.png": picture(3),
    "valid/images/d.png": picture(4),
    "valid/labels/d.txt": BOX,
}
LABEL_STUDIO = {
    "classes.txt": b"ant\nbee\n",
    "notes.json": b'{"categories": [{"id": 0, "name": "ant"}, {"id": 1, "name": "bee"}]}',
    "images/1f-a.png": picture(1),
    "labels/1f-a.txt": BOX,
    "images/b.png": picture(2),
    "labels/b.txt": b"\n",
    "images/c.png": picture(3),
}
LABEL_IMG = {
    "classes.txt": b"ant\r\nbee\r\n",
    "a.png": picture(1),
    "a.txt": b"\xef\xbb\xbf" + BOX,
    "b.png": picture(2),
    "b.txt": b"",
    "c.png": picture(3),
}


@pytest.mark.parametrize("files", [ULTRALYTICS, ROBOFLOW, LABEL_STUDIO, LABEL_IMG])
def test_boxes_are_read_as_each_tool_writes_them(tmp_path: Path, files: dict[str, bytes]) -> None:
    data = snapshot(put(tmp_path, files), BOXES)
    assert boxes(data) == {1: 1, 2: -1, 3: -1}
    assert seeds(data.x_val) == ([4] if files in (ULTRALYTICS, ROBOFLOW) else [])


@pytest.mark.parametrize("files", [ULTRALYTICS, ROBOFLOW, LABEL_STUDIO, LABEL_IMG])
def test_classes_of_boxes_are_those_of_the_fleet_by_their_names(tmp_path: Path, files: dict[str, bytes]) -> None:
    assert boxes(snapshot(put(tmp_path, files), BOXES, names=("bee", "cat", "ant"))) == {1: 0, 2: -1, 3: -1}
    assert boxes(snapshot(tmp_path, BOXES, names=())) == {1: 1, 2: -1, 3: -1}


def test_a_box_of_a_class_that_the_fleet_lacks_is_refused(tmp_path: Path) -> None:
    put(tmp_path, {"classes.txt": b"ant\nbee\n", "images/a.png": picture(1), "labels/a.txt": BOX})
    with pytest.raises(DataError) as error:
        snapshot(tmp_path, BOXES, names=("ant", "cat"))
    assert "--class-names" in str(error.value)


def test_the_parts_of_a_divided_folder_are_kept(tmp_path: Path) -> None:
    shares = SplitShares(0.5, 0.5)
    for root, has_test in ((tmp_path / "three", True), (tmp_path / "two", False)):
        for n in range(40):
            put(root, {f"train/{NAMES[n % 2]}/{n}.png": picture(n)})
        put(root, {"valid/ant/a.png": picture(50), "valid/bee/b.png": picture(51)})
        if has_test:
            put(root, {"test/ant/a.png": picture(60), "test/bee/again.png": picture(1)})
        data = snapshot(root, CLASSES, shares)
        assert seeds(data.x_val) == [50, 51]
        if has_test:
            assert seeds(data.x_test) == [1, 60]
            assert seeds(data.x_train) == [n for n in range(40) if n != 1]
        else:
            assert 0 < len(data.y_test) < 40
            assert sorted([*seeds(data.x_train), *seeds(data.x_test)]) == list(range(40))


@pytest.mark.parametrize(
    ("files", "way_out"), [(("train/ant", "runs/x"), "parts"), (("export/images", "export/labels"), "itself")]
)
def test_a_folder_that_is_no_class_is_named_with_what_it_rather_is(
    tmp_path: Path, files: tuple[str, ...], way_out: str
) -> None:
    for name in files:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(ConfigError) as error:
        snapshot(tmp_path, CLASSES)
    assert error.value.got in {name.partition("/")[0] for name in files}
    assert way_out in error.value.hint


SYSTEM = (
    "lost+found",
    "$RECYCLE.BIN",
    "System Volume Information",
    "@eaDir",
    "#recycle",
    "__MACOSX",
    ".ipynb_checkpoints",
    ".Trash-1000",
    "FOUND.000",
    "LOST.DIR",
)


@pytest.mark.parametrize("inside", ["", "ant/", "train/"])
def test_what_operating_systems_put_between_samples_is_none(
    tmp_path: Path, inside: str, caplog: pytest.LogCaptureFixture
) -> None:
    below = "train/" if inside == "train/" else ""
    put(tmp_path, {f"{below}ant/a.png": picture(1), f"{below}bee/b.png": picture(2), f"{below}ant/._a.png": b"fork"})
    for name in SYSTEM:
        put(tmp_path, {f"{inside}{name}/x.png": picture(9)})
    assert seeds(snapshot(tmp_path, CLASSES).x_train) == [1, 2]
    assert not caplog.text


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"images/a.png": picture(1), "labels/a.txt": b"1 .5 .5 .1 .1 .9\n"}, "confidence"),
        ({"images/a.png": picture(1), "labels/a.txt": b"1 .1 .1 .2 .2 .3 .3\n"}, "outlines"),
        ({"images/a.png": picture(1), "masks/b.png": picture(1)}, "labels"),
        ({"images/a.avif": b"", "labels/a.txt": BOX}, ".avif"),
        ({"ant/a.heic": b""}, ".heic"),
        ({"ant/a.doc": b""}, ".jpg"),
        ({"ant/a.png": b"no image"}, "JPEG or PNG"),
    ],
)
def test_what_has_nothing_to_train_on_says_why(tmp_path: Path, files: dict[str, bytes], reason: str) -> None:
    """The error is all that a server gets: a board's log stays on the board."""
    targets = CLASSES if "ant/" in next(iter(files)) else BOXES
    targets = Targets("cross_entropy", 2, ("h", "w")) if any(name.startswith("masks") for name in files) else targets
    with pytest.raises(DataError) as error:
        snapshot(put(tmp_path, files), targets)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.txt", "a b\nc\n\n"),
        ("data.yaml", 'nc: 2\nnames: [ "a b" ,\n  c ]\nother: [x]\n'),
        ("data.yaml", "# names\nnames:\n- a b\n- c\nroboflow:\n  x: y\n"),
        ("dataset.yaml", "names:\n  # all\n  0: a b  # first\n\n  1: 'c'\ndownload: |\n  2: d\n"),
    ],
)
def test_names_of_classes_are_read_in_each_form(tmp_path: Path, name: str, text: str) -> None:
    put(tmp_path, {name: text.encode()})
    assert find_class_list([tmp_path / "none", tmp_path]) == ("a b", "c")

"""Folders as the tools of the field write them: Ultralytics, Roboflow, Label Studio, LabelImg."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.core.errors import ConfigError, DataError
from fedprune_device.data.box_layouts import find_class_list
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
        ({"images/a.png": picture(1), "labels/a.txt": b"1 .1 .1 .2 .2 .3 .3 .4\n"}, "outline of x and y"),
        ({"images/a.png": picture(1), "masks/b.png": picture(1)}, "no mask"),
        ({"images/a.avif": b"", "labels/a.txt": BOX}, ".avif"),
        ({"ant/a.heic": b""}, ".heic"),
        ({"ant/a.doc": b""}, ".jpg"),
        ({"a.csv": b"x,y\n1,2\n", "b.csv": b"x,y\n1,2\n"}, "tail -qn +2"),
        ({"ant/a.parquet": b""}, "A table is one file"),
        ({"a.npz": b""}, "--data FOLDER/NAME.npz"),
        ({"ant/a.png": b"no image"}, "JPEG or PNG"),
    ],
)
def test_what_has_nothing_to_train_on_says_why(tmp_path: Path, files: dict[str, bytes], reason: str) -> None:
    """The error is all that a server gets: a board's log stays on the board."""
    targets = BOXES if any(name.startswith("images/") for name in files) else CLASSES
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
        ("fruits.yaml", "train: images\nnames: [a b, c]\n"),
        ("data.yaml", "names: [\n  'a b',\n  c,\n  ]\n"),
        ("data.yaml", "names: {0: a b, 1: c , }\n"),
        ("notes.json", '{"categories": [{"id": 0, "name": "a b"}, {"id": 1, "name": "c"}], "info": {"year": 2024}}'),
        ("dataset.yaml", "names:\n  # all\n  0: a b  # first\n\n  1: 'c'\ndownload: |\n  2: d\n"),
    ],
)
def test_names_of_classes_are_read_in_each_form(tmp_path: Path, name: str, text: str) -> None:
    put(tmp_path, {name: text.encode()})
    assert find_class_list([tmp_path / "none", tmp_path]) == ("a b", "c")


@pytest.mark.parametrize(
    ("text", "names"),
    [("names: ['a]', \"b, c\"]\n", ("a]", "b, c")), ("names:\n  - C# # sharp\n  - it's\n", ("C#", "it's"))],
)
def test_marks_of_yaml_may_be_in_the_name_of_a_class(tmp_path: Path, text: str, names: tuple[str, ...]) -> None:
    put(tmp_path, {"data.yaml": text.encode()})
    assert find_class_list([tmp_path]) == names


@pytest.mark.parametrize("text", ["[" + "\n" * 60_000, "[" + "," * 60_000, "{" + "9" * 9000 + ": a}"])
def test_names_that_are_no_list_are_refused_at_once(tmp_path: Path, text: str) -> None:
    put(tmp_path, {"data.yaml": f"names: {text}\n".encode()})
    start = time.process_time()
    with pytest.raises(ConfigError) as error:
        find_class_list([tmp_path])
    assert "names in" in error.value.what
    assert time.process_time() - start < 1


def test_outlines_become_the_boxes_around_them_and_the_log_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    outline = b"1 .2 .1 .6 .2 .3 .5\n0 .5 .5 .2 .2\n"
    put(tmp_path, {f"images/{n}.png": picture(n) for n in (1, 2)} | {f"labels/{n}.txt": outline for n in (1, 2)})
    samples = SampleFolder(tmp_path, (Pixels(),), SplitShares(0.0), 100, NAMES)
    for _ in range(2):
        y = np.asarray(samples.snapshot(SHAPE, BOXES).y_train)
    np.testing.assert_allclose(y[0], [[1, 0.4, 0.3, 0.4, 0.4], [0, 0.5, 0.5, 0.2, 0.2]], atol=1e-6)
    assert caplog.text.count("outlines of objects") == 1


def test_keypoints_behind_a_box_are_no_outline(tmp_path: Path) -> None:
    line = b"1 .5 .5 .25 .5" + b" .1 .1 2" * 4 + b"\n"
    put(tmp_path, {"data.yaml": b"kpt_shape: [4, 3]\n", "images/a.png": picture(1), "labels/a.txt": line})
    np.testing.assert_allclose(np.asarray(snapshot(tmp_path, BOXES).y_train)[0, 0], [1, 0.5, 0.5, 0.25, 0.5])


PATHS = {
    "a": "path: /content/sets/x\ntrain: images/a  # 4 images\nval: images/b\ntest:  # optional\n",
    "b": "train: ../x/images/a\nval: [images/b]\ntest: null\n",
    "list": "train:\n  - images/a\nval:\n  - 'lists/val.txt'\n",
}


@pytest.mark.parametrize("text", PATHS.values(), ids=PATHS)
def test_the_parts_are_those_that_data_yaml_names(tmp_path: Path, text: str) -> None:
    put(tmp_path, {"data.yaml": f"{text}names: [ant, bee]\n".encode(), "lists/val.txt": b"./images/b/4.png\n"})
    for n, folder in enumerate(("a", "a", "a", "b", "c"), 1):
        put(tmp_path, {f"images/{folder}/{n}.png": picture(n), f"labels/{folder}/{n}.txt": BOX})
    data = snapshot(tmp_path, BOXES)
    assert (seeds(data.x_train), seeds(data.x_val)) == ([1, 2, 3], [4])


def test_lists_tell_images_of_one_name_in_several_parts_apart(tmp_path: Path) -> None:
    put(tmp_path, {"data.yaml": b"train: train.txt\nval: /content/x/val.txt\n", "train.txt": b"./train/images/1.png\n"})
    put(tmp_path, {"val.txt": b"/content/x/val/images/1.png\n"})
    for n, part in enumerate(("train", "val"), 1):
        put(tmp_path, {f"{part}/images/1.png": picture(n), f"{part}/labels/1.txt": BOX})
    data = snapshot(tmp_path, BOXES)
    assert (seeds(data.x_train), seeds(data.x_val)) == ([1], [2])


def test_a_folder_that_is_trained_and_validated_on_is_divided(tmp_path: Path) -> None:
    put(tmp_path, {"data.yaml": b"train: images/all\nval: images/all\n"})
    for n in range(40):
        put(tmp_path, {f"images/all/{n}.png": picture(n), f"labels/all/{n}.txt": BOX})
    data = snapshot(tmp_path, BOXES, SplitShares(0.25, 0.25))
    parts = [seeds(x) for x in (data.x_train, data.x_val, data.x_test)]
    assert all(parts)
    assert sorted(seed for part in parts for seed in part) == list(range(40))


def test_folders_of_coco_and_of_cvat_are_parts_by_their_names(tmp_path: Path) -> None:
    for root, train, val in (
        ("coco", "images/train2017", "images/val2017"),
        ("cvat", "obj_train_data", "obj_valid_data"),
    ):
        labels = ["labels/" + f.partition("/")[2] if "/" in f else f for f in (train, val)]
        for n, (folder, beside) in enumerate(zip((train, val), labels, strict=True), 1):
            put(tmp_path / root, {f"{folder}/{n}.png": picture(n), f"{beside}/{n}.txt": BOX})
        data = snapshot(tmp_path / root, BOXES)
        assert (seeds(data.x_train), seeds(data.x_val)) == ([1], [2])


def voc(*objects: tuple[str, int, int, int, int], size: tuple[int, int] = (100, 50)) -> bytes:
    """As LabelImg writes it."""
    texts = [
        f"<object><name>{name}</name><pose>Unspecified</pose><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax>"
        f"<ymax>{d}</ymax></bndbox><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"
        for name, a, b, c, d in objects
    ]
    head = f"<folder>x</folder><size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"<annotation verified='yes'>{head}{''.join(texts)}</annotation>".encode()


@pytest.mark.parametrize("folders", [("JPEGImages", "Annotations"), ("images", "annotations"), (".", ".")])
def test_boxes_of_pascal_voc_are_shares_of_the_image(
    tmp_path: Path, folders: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    images, labels = folders
    bodies = {
        1: voc(("bee", 1, 1, 50, 50), ("ant", 41, 11, 60, 20)),
        2: voc(),
        3: voc(("cat", 1, 1, 5, 5)),
        4: voc(("bee", 1, 1, 500, 5)),
        5: voc(("bee", 1, 1, 5, 5), size=(0, 0)),
        6: b'<!DOCTYPE a [<!ENTITY b "c">]>' + voc(("bee", 1, 1, 5, 5)),
        7: voc(("bee", 1, 1, 5, 5))[:-3],
        8: b"<a>" * 100,
        10: voc(("bee", 0, 0, 100, 50)),  # of a tool that counts pixels from 0
    }
    for n, body in bodies.items():
        put(tmp_path, {f"{images}/{n}.png": picture(n), f"{labels}/{n}.xml": body})
    put(tmp_path, {f"{images}/9.png": picture(9)})
    data = snapshot(tmp_path, BOXES)
    labels_of = {seeds([x])[0]: y for x, y in zip(np.asarray(data.x_train), np.asarray(data.y_train), strict=True)}
    empty = [-1, 0, 0, 0, 0]
    assert labels_of.keys() == {1, 2, 10}
    np.testing.assert_allclose(labels_of[10], [[1, 0.5, 0.5, 1, 1], empty])
    np.testing.assert_allclose(labels_of[1], [[1, 0.25, 0.5, 0.5, 1], [0, 0.5, 0.3, 0.2, 0.2]], atol=1e-6)
    np.testing.assert_allclose(labels_of[2], [empty, empty])
    assert caplog.text.count("is left out") >= 6
    assert "DOCTYPE" in caplog.text


def test_the_lists_of_pascal_voc_divide_its_images(tmp_path: Path) -> None:
    for n in range(1, 5):
        put(tmp_path, {f"JPEGImages/{n}.png": picture(n), f"Annotations/{n}.xml": voc(("bee", 1, 1, 50, 50))})
    put(tmp_path, {"ImageSets/Main/train.txt": b"1\n2\n", "ImageSets/Main/val.txt": b"3\n"})
    put(tmp_path, {"ImageSets/Main/bee_train.txt": b"4 1\n"})
    data = snapshot(tmp_path, BOXES)
    assert (seeds(data.x_train), seeds(data.x_val)) == ([1, 2], [3])
    with pytest.raises(DataError) as error:
        snapshot(tmp_path, BOXES, names=())
    assert "--class-names" in error.value.hint


def test_two_files_that_name_classes_are_refused(tmp_path: Path) -> None:
    put(tmp_path, {"a.yaml": b"names: [ant, bee]\n", "b.yaml": b"names: [bee, ant]\n", "c.yaml": b"lr: 1\n"})
    with pytest.raises(ConfigError) as error:
        find_class_list([tmp_path])
    assert "data.yaml" in error.value.hint

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.core.errors import DataError
from fedprune_device.data.box_layouts import yolo_boxes
from fedprune_device.data.image_decoding import Pixels, read_mask
from fedprune_device.data.labels import Targets
from fedprune_device.data.sample_folder import SampleFolder
from fedprune_device.data.splits import SplitShares
from support.fakes.sample_files import image_file

pytestmark = pytest.mark.board

Image = pytest.importorskip("PIL.Image")

SHAPE = (3, 8, 6)
DENSE = Targets("cross_entropy", 4, ("height", "width"), 255)
BOXES = Targets("custom", 7, (3, 5))


def picture(seed: int) -> bytes:
    return image_file(np.random.default_rng(seed).integers(0, 256, (8, 6, 3)).astype(np.uint8))


def put(root: Path, name: str, body: bytes) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(body)


def folder(root: Path, names: tuple[str, ...] = (), test: float = 0.0) -> SampleFolder:
    return SampleFolder(root, (Pixels(),), SplitShares(test), 100, names)


def by_image(data: Any) -> dict[bytes, Any]:
    return {x.tobytes(): y for x, y in zip(np.asarray(data.x_train), np.asarray(data.y_train), strict=True)}


def x_of(body: bytes) -> bytes:
    return Pixels().read(body, ("PNG",), SHAPE).tobytes()


@pytest.mark.parametrize("old", [(8, 6), (16, 12), (5, 17), (1, 1)])
@pytest.mark.parametrize("mode", ["L", "1", "P", "I;16"])
def test_a_mask_is_resized_to_its_nearest_pixels(old: tuple[int, int], mode: str) -> None:
    numbers = np.random.default_rng(0).integers(0, 2 if mode == "1" else 200, old)
    image = Image.fromarray(numbers.astype({"1": np.bool_, "I;16": np.uint16}.get(mode, np.uint8)))
    if mode == "P":
        image.putpalette([c for n in range(256) for c in (n, 255 - n, 7)])
    expected = Image.fromarray(numbers.astype(np.uint8)).resize((6, 8), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(read_mask(image_file(image), 8, 6), np.asarray(expected))


def test_masks_are_the_labels_of_images_of_the_same_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng, expected = np.random.default_rng(1), {}
    for n in range(5):
        classes = np.where(rng.random((8, 6)) < 0.2, 255, rng.integers(0, 4, (8, 6))).astype(np.uint8)
        put(tmp_path, f"images/{n}.png", picture(n))
        put(tmp_path, f"masks/{n}.png", image_file(classes))
        expected[x_of(picture(n))] = classes
    put(tmp_path, "images/alone.png", picture(7))
    put(tmp_path, "images/wrong.png", picture(8))
    put(tmp_path, "masks/wrong.png", image_file(np.full((8, 6), 4, np.uint8)))
    put(tmp_path, "images/colours.png", picture(9))
    put(tmp_path, "masks/colours.png", picture(9))
    data = folder(tmp_path).snapshot(SHAPE, DENSE)
    labels = by_image(data)
    assert labels.keys() == expected.keys()
    for x, classes in expected.items():
        np.testing.assert_array_equal(labels[x], classes)
    assert "wrong.png is left out: a label is out of range" in caplog.text
    assert "colours.png is left out: a mask: expected one number per pixel" in caplog.text
    data.check(DENSE, SHAPE)
    assert data.y_train.nbytes <= 16 * len(labels), "masks are held in memory"
    for x, y in by_image(folder(tmp_path).snapshot(SHAPE, Targets("cross_entropy", 4, ("h", "w"), -100))).items():
        np.testing.assert_array_equal(y, np.where(expected[x] == 255, -100, expected[x].astype(int)))


def test_images_without_masks_are_counted_with_what_to_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for n in range(1, 6):
        put(tmp_path, f"images/{n}.png", picture(n))
    for n in (1, 2):
        put(tmp_path, f"masks/{n}.jpg", image_file(np.zeros((8, 6), np.uint8), "JPEG"))
    with pytest.raises(DataError, match="masks must be PNG"):
        folder(tmp_path).snapshot(SHAPE, DENSE)
    put(tmp_path, "masks/5.png", image_file(np.zeros((8, 6), np.uint8)))
    caplog.clear()
    samples = folder(tmp_path)
    for _ in range(2):
        assert len(samples.snapshot(SHAPE, DENSE).y_train) == 1
    # Once, although each round looks at the files again.
    assert [r.getMessage().partition(" are left out ")[2][:26] for r in caplog.records] == [
        "(2, such as 1.png): its ma", "(2, such as 3.png): it has"
    ]  # fmt: skip


def test_a_mask_that_is_refused_says_how_to_save_it(tmp_path: Path) -> None:
    classes = np.random.default_rng(0).integers(0, 3, (8, 6)).astype(np.uint8)
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8)
    for name, mask in (("colours", colours[classes]), ("grey", classes[:, :, None].repeat(3, 2))):
        with pytest.raises(DataError) as error:
            read_mask(image_file(mask), 8, 6)
        hint = str(error.value).partition("Image.fromarray")[2] or str(error.value)
        # What it says gives the classes back.
        path = tmp_path / f"{name}.png"
        path.write_bytes(image_file(mask))
        if name == "grey":
            assert "convert('L')" in hint
            Image.open(path).convert("L").save(path)
        else:
            rgb = np.asarray(Image.open(path))
            assert "(rgb[:, :, None] == COLOURS).all(-1).argmax(-1).astype('uint8')" in hint
            Image.fromarray((rgb[:, :, None] == colours).all(-1).argmax(-1).astype("uint8")).save(path)
        np.testing.assert_array_equal(read_mask(path.read_bytes(), 8, 6), classes)
    put(tmp_path, "one/images/a.png", picture(1))
    put(tmp_path, "one/masks/a.png", image_file(np.full((8, 6), 255, np.uint8)))
    with pytest.raises(DataError, match="--set ignore_label=255"):
        folder(tmp_path / "one").snapshot(SHAPE, Targets("cross_entropy", 4, ("h", "w")))


@pytest.mark.parametrize("outputs", [1, 3])
def test_losses_of_a_label_for_each_output_take_masks_as_one_map_per_class(tmp_path: Path, outputs: int) -> None:
    classes = np.random.default_rng(0).choice([0, 1, 2, 255], (8, 6)).astype(np.uint8)
    put(tmp_path, "images/a.png", picture(1))
    put(tmp_path, "masks/a.png", image_file(classes))
    maps = np.asarray(folder(tmp_path).snapshot(SHAPE, Targets("bce", outputs, (outputs, 8, 6))).y_train)[0]
    for k in range(outputs):
        np.testing.assert_array_equal(maps[k], classes > 0 if outputs == 1 else classes == k)


def test_boxes_of_text_files_are_padded_and_an_image_without_a_file_has_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bodies = {"two": b"1 .5 .5 .25 .5\n\n0 0.1 0.2 0.1 0.1\n", "none": None, "empty": b"", "torn": b"1 .5 .5"}
    bodies["many"] = b"".join(b"%d 0.5 0.5 0.%d 0.5\n" % (n, n + 1) for n in range(5))
    for n, (name, body) in enumerate(bodies.items()):
        put(tmp_path, f"images/{name}.png", picture(n))
        if body is not None:
            put(tmp_path, f"labels/{name}.txt", body)
    (tmp_path / "labels").mkdir(exist_ok=True)
    data = folder(tmp_path).snapshot(SHAPE, BOXES)
    labels, empty = by_image(data), [-1, 0, 0, 0, 0]
    expected = {
        0: [[1, 0.5, 0.5, 0.25, 0.5], [0, 0.1, 0.2, 0.1, 0.1], empty],
        1: [empty] * 3,
        2: [empty] * 3,
        4: [[n, 0.5, 0.5, (n + 1) / 10, 0.5] for n in (2, 3, 4)],
    }
    assert labels.keys() == {x_of(picture(n)) for n in expected}
    for n, boxes in expected.items():
        np.testing.assert_allclose(labels[x_of(picture(n))], boxes, atol=1e-7)
    assert "torn.png is left out: line 1 of the labels: expected class cx cy w h" in caplog.text
    data.check(BOXES, SHAPE)


def test_labels_are_not_needed_for_predictions(tmp_path: Path) -> None:
    put(tmp_path, "images/a.png", picture(0))
    put(tmp_path, "masks/a.png", image_file(np.zeros((8, 6), np.uint8)))
    for old, new in (("masks", None), ("masks", "labels")):
        if new is not None:
            shutil.move(tmp_path / old, tmp_path / new)
        data = folder(tmp_path).snapshot(SHAPE)
        assert data.y_train is data.x_train


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("0 .5 .5 .1", "line 1 of the labels: expected class cx cy w h"),
        ("\n-1 .5 .5 .1 .1", "line 2 .* expected a class from 0 to 16777215, got something else"),
        ("1.5 .5 .5 .1 .1", "expected a class"),
        ("0 .5 .5 .1 nan", "expected shares of the image"),
        ("é", "line 1 of the labels"),
    ],
)
def test_a_line_that_is_no_box_is_one_clear_error(text: str, error: str) -> None:
    with pytest.raises(DataError, match=error):
        yolo_boxes(text.encode())


def test_new_boxes_of_an_image_are_read_at_the_next_round(tmp_path: Path) -> None:
    put(tmp_path, "images/a.png", picture(0))
    samples = folder(tmp_path)
    for boxes in (1, 3, 2):
        put(tmp_path, "labels/a.txt", b"1 .5 .5 .25 .5\n" * boxes)
        assert (np.asarray(samples.snapshot(SHAPE, BOXES).y_train)[0, :, 0] >= 0).sum() == boxes

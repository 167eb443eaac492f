import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedprune.core.errors import ConfigError, DataError, StorageError
from fedprune_device.data.image_decoding import Pixels
from fedprune_device.data.sample_folder import SampleFolder
from fedprune_device.data.splits import SplitShares
from support.fakes.sample_files import image_file

pytestmark = pytest.mark.board

SHAPE = (3, 4, 5)
NAMES = ("ant", "bee")


def put(root: Path, name: str, seed: int) -> Any:
    """An image of the model's size, and its numbers."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3)).astype(np.uint8)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(image_file(pixels))
    return pixels.transpose(2, 0, 1).astype(np.float32) / 255


def folder(root: Path, max_samples: int = 100, test: float = 0.0) -> SampleFolder:
    return SampleFolder(root, (Pixels(),), SplitShares(test, device="d"), max_samples, NAMES)


def test_images_are_samples_of_their_folders_class(tmp_path: Path) -> None:
    expected = {(0, put(tmp_path, "ant/a.png", 1).tobytes()), (1, put(tmp_path, "bee/b.PNG", 2).tobytes())}
    expected.add((1, put(tmp_path, "1/c.png", 3).tobytes()))
    (tmp_path / "bee" / "notes.txt").write_text("no image")
    (tmp_path / ".trash").mkdir()
    samples = folder(tmp_path)
    data = samples.snapshot(SHAPE)
    assert {(int(y), x.tobytes()) for x, y in zip(data.x_train, data.y_train, strict=True)} == expected
    assert samples.samples == 3


def test_new_images_are_there_at_the_next_round(tmp_path: Path) -> None:
    put(tmp_path, "ant/a.png", 1)
    samples = folder(tmp_path)
    put(tmp_path, "bee/b.png", 2)
    assert samples.samples == 1
    assert samples.snapshot(SHAPE).samples == 2
    (tmp_path / "ant" / "a.png").unlink()
    assert samples.snapshot(SHAPE).samples == 1


def test_a_test_image_is_never_trained_on_whatever_it_is_called(tmp_path: Path) -> None:
    for n in range(30):
        put(tmp_path, f"ant/{n}.png", n)
    first = folder(tmp_path, test=0.3).snapshot(SHAPE)
    for n in range(30):
        (tmp_path / "ant" / f"{n}.png").rename(tmp_path / "ant" / f"{99 - n}.png")
    put(tmp_path, "ant/new.png", 50)
    second = folder(tmp_path, test=0.3).snapshot(SHAPE)
    tested = {x.tobytes() for x in first.x_test}
    assert 0 < len(tested) < 30
    assert tested <= {x.tobytes() for x in second.x_test}


def test_of_too_many_each_class_gets_a_fair_share_and_always_the_same(tmp_path: Path) -> None:
    for n in range(12):
        put(tmp_path, f"ant/{n}.png", n)
    for n in range(3):
        put(tmp_path, f"bee/{n}.png", 100 + n)
    data = folder(tmp_path, max_samples=8).snapshot(SHAPE)
    assert np.bincount(data.y_train).tolist() == [5, 3]
    np.testing.assert_array_equal(folder(tmp_path, max_samples=8).snapshot(SHAPE).x_train, data.x_train)


class SmallPixels(Pixels):
    max_bytes = 2000


def test_an_image_that_is_damaged_or_too_large_is_left_out_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "ant/a.png", 1)
    (tmp_path / "ant" / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "ant" / "large.jpg").write_bytes(bytes(3000))
    assert SampleFolder(tmp_path, (SmallPixels(),), SplitShares(0.0), 100, NAMES).snapshot(SHAPE).samples == 1
    assert "torn.jpg is left out" in caplog.text
    assert "large.jpg is left out" in caplog.text


def test_a_pipe_or_a_link_that_is_called_like_an_image_is_left_out_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, "ant/a.png", 1)
    os.mkfifo(tmp_path / "ant" / "pipe.jpg")
    (tmp_path / "ant" / "folder.jpg").mkdir()
    (tmp_path / "ant" / "link.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "ant" / "socket.jpg"))
        assert folder(tmp_path).snapshot(SHAPE).samples == 1
    for name in ("pipe", "folder", "link", "socket"):
        assert f"{name}.jpg is left out" in caplog.text
    (tmp_path / "ant" / "a.png").unlink()
    with pytest.raises(DataError, match=r"a link|regular file") as caught:
        folder(tmp_path).snapshot(SHAPE)
    assert ".jpg" not in str(caught.value)  # which the server sees


def test_a_folder_without_images_has_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to train on"):
        folder(tmp_path).snapshot(SHAPE)
    with pytest.raises(StorageError, match="can't read"):
        folder(tmp_path / "none")


def test_files_that_have_not_changed_are_not_read_again(tmp_path: Path) -> None:
    """Files of the same bytes count once, so that it is seen whether they are read."""
    root, state = tmp_path / "data", tmp_path / "state"

    def open_folder(state: Path | None = state) -> SampleFolder:
        return SampleFolder(root, (Pixels(),), SplitShares(0.0), 100, NAMES, state)

    for n in range(2):
        put(root, f"ant/{n}.png", n)
    first, second = (root / f"ant/{n}.png" for n in range(2))
    samples = open_folder()
    expected = np.asarray(samples.snapshot(SHAPE).x_train)
    status = second.stat()
    second.write_bytes(first.read_bytes())
    assert second.stat().st_size == status.st_size
    os.utime(second, ns=(status.st_atime_ns, status.st_mtime_ns))
    np.testing.assert_array_equal(np.asarray(samples.snapshot(SHAPE).x_train), expected)
    with (state / "images.index").open("a") as file:
        file.write('["ant/5.png", 1, 2')  # torn by a power cut
    put(root, "bee/new.png", 9)
    assert [open_folder().samples for _ in range(2)] == [3, 3]
    assert open_folder(None).samples == 2
    second.touch()
    assert open_folder().samples == 2


def test_decoded_images_take_no_memory_and_no_more_room_than_they_may(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for n in range(12):
        put(tmp_path, f"ant/{n}.png", n)
        put(tmp_path, f"bee/{n}.png", 50 + n)
    data = SampleFolder(tmp_path, (Pixels(),), SplitShares(0.0), 100, NAMES, room=8 * (4 * 5 * 3 + 8)).snapshot(SHAPE)
    assert np.bincount(data.y_train).tolist() == [4, 4]
    assert "files of" in caplog.text
    assert data.x_train.nbytes == 8 * 8  # their rows
    unlimited = folder(tmp_path).snapshot(SHAPE)
    assert len(unlimited.y_train) == 24
    images = {x.tobytes() for x in np.asarray(unlimited.x_train)}
    assert all(x.tobytes() in images for x in np.asarray(data.x_train))


def test_a_folder_that_is_no_class_is_an_error(tmp_path: Path) -> None:
    put(tmp_path, "dog/a.png", 1)
    with pytest.raises(ConfigError, match="dog"):
        folder(tmp_path)

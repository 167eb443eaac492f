"""Files of data sets: what others write is read exactly, and what is damaged or dangerous is refused."""

import io
import os
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedprune.core.errors import ConfigError, DataError
from fedprune_device.data.array_source import read_arrays
from fedprune_device.data.image_decoding import Pixels
from fedprune_export.checks.labelled_file import read_labelled_data
from fedprune_server.simulation.datasets.data_plan import DataPlan
from fedprune_server.simulation.datasets.decoding import Decoding
from fedprune_server.simulation.datasets.image_files import read_image_folder
from fedprune_server.simulation.datasets.npz_files import npz_arrays, read_npz
from fedprune_server.simulation.datasets.preparation import Preparation
from fedprune_server.simulation.datasets.samples import Samples, assemble_samples
from support.fakes.sample_files import image_file
from support.fakes.tiny_job import ARCHITECTURE
from support.nets import drawn_models as strategies  # noqa: F401 - its settings of Hypothesis


def images(n, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


def labels(n, classes=10):
    return np.arange(n) % classes


def write_images(folder, names, side=6):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images(1, side, side, 3, seed=number)[0]).save(path)


# --- npz


def test_npz_with_a_split(tmp_path):
    x, y = images(700, 16, 16), labels(700)
    np.savez(tmp_path / "a.npz", x_train=x[:600], y_train=y[:600], x_test=x[600:], y_test=y[600:].astype(np.uint8))
    read = read_npz(tmp_path / "a.npz")
    assert np.array_equal(read.take(np.arange(700)), x)
    assert np.array_equal(read.labels, y)
    assert read.is_test.sum() == 100
    assert read.is_test[600:].all()


def test_npz_with_owners_and_marks(tmp_path):
    x = np.random.default_rng(0).standard_normal((40, 9, 128)).astype(np.float32)
    subject = np.repeat([3, 7, 30, 1], 10)
    np.savez(tmp_path / "a.npz", x=x, y=labels(40, 6), subject=subject, is_test=subject == 7, lossy=np.zeros(3))
    read = read_npz(tmp_path / "a.npz")
    assert read.owner_names == ("1", "3", "7", "30")
    assert [read.owner_names[o] for o in read.owners] == list(map(str, subject))
    assert np.array_equal(read.is_test, subject == 7)
    assert read.classes == 6


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_arrays_are_what_numpy_reads(tmp_path, save, order):
    arrays = {
        "big": np.asarray(images(300, 28, 28), order=order),
        "float": np.asarray(np.random.default_rng(0).standard_normal((200, 100)), order=order),
        "small": np.arange(5),
        "texts": np.array(["cat", "dog"]),
        "empty": np.zeros((0, 4)),
    }
    save(tmp_path / "a.npz", **arrays)
    read = npz_arrays(tmp_path / "a.npz")
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        assert np.array_equal(read[name], array)
    assert isinstance(read["big"], np.memmap) == (save is np.savez)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("read", [npz_arrays, read_arrays, lambda path: read_labelled_data(path, ARCHITECTURE, "f4")])
@pytest.mark.parametrize("member", ["no array", "pipe"])
def test_a_pipe_and_a_member_that_is_no_array_are_refused_in_one_sentence(tmp_path, read, member):
    path = tmp_path / "a.npz"
    if member == "pipe":
        os.mkfifo(path)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", "no array")
            archive.writestr("y.npy", "no array")
    with pytest.raises(DataError, match=r"a\.npz.*(no array|not a regular file)"):
        read(path)


def test_an_npz_with_objects_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([{}] * 20000, object), y=labels(20000))
    with pytest.raises(DataError, match="never unpickled"):
        read_npz(tmp_path / "a.npz")


@given(st.data())
def test_a_damaged_npz_is_read_or_refused(tmp_path_factory, data):
    file = io.BytesIO()
    np.savez(file, x=images(100, 32, 32), y=labels(100))
    raw = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        near = data.draw(st.sampled_from([0, 0, 128, len(raw) - 400]))
        raw[min(len(raw) - 1, near + data.draw(st.integers(0, 399)))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    path.write_bytes(raw)
    try:
        read = read_npz(path)
    except DataError:
        return
    assert len(read) == sum(map(len, read.arrays))


# --- folders of images


def test_a_folder_per_class(tmp_path):
    write_images(tmp_path, ["dog/1.png", "cat/2.png", "cat/1.png", "cat/notes.txt.png"])
    read = read_image_folder(tmp_path)
    assert read.class_names == ("cat", "dog")
    assert read.labels.tolist() == [0, 0, 0, 1]
    assert np.array_equal(read.take([0]), images(1, 6, 6, 3, seed=2))
    assert read.owners is None


def test_folders_of_splits_and_of_domains(tmp_path):
    write_images(tmp_path / "split", ["train/a/1.png", "train/b/1.png", "test/b/1.png"])
    split = read_image_folder(tmp_path / "split")
    assert split.labels[split.is_test].tolist() == [1]
    write_images(tmp_path / "domains", ["photo/a/1.png", "photo/b/1.png", "sketch/b/1.png"])
    domains = read_image_folder(tmp_path / "domains", Decoding(colour=False))
    assert domains.owner_names == ("photo", "sketch")
    assert domains.owners.tolist() == [0, 0, 1]
    assert domains.shape == (6, 6)


def test_images_of_different_sizes_need_a_size(tmp_path):
    write_images(tmp_path, ["a/1.png"])
    write_images(tmp_path, ["b/2.png"], side=9)
    with pytest.raises(DataError, match=r"2\.png: size"):
        read_image_folder(tmp_path)
    assert read_image_folder(tmp_path, Decoding(size=(4, 5))).shape == (4, 5, 3)


def test_a_file_that_programs_would_run_on_is_no_image_whatever_its_name(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(images(1, 6, 6, 3)[0]).save(tmp_path / "a" / "1.eps")
    (tmp_path / "a" / "1.eps").rename(tmp_path / "a" / "1.png")
    with pytest.raises(DataError, match=r"a/1\.png.*something else"):
        read_image_folder(tmp_path)


@pytest.mark.parametrize(
    ("kind", "mode", "colour", "size"),
    [("PNG", "RGBA", True, (4, 3)), ("PNG", "I;16", False, (9, 6)), ("JPEG", "RGB", False, (4, 3))],
)
def test_an_image_is_the_same_to_a_simulation_as_to_a_board(tmp_path, kind, mode, colour, size):
    pixels = np.dstack([images(1, 6, 9, 3)[0], images(1, 6, 9, seed=1)[0]])
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / "a" / "1.png"
    file.parent.mkdir()
    image = Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 200 if mode == "I;16" else pixels[:, :, : len(mode)])
    image.save(file, kind, exif=exif)
    samples = read_image_folder(tmp_path, Decoding(size=size, colour=colour)).take([0])[0]
    board = Pixels().decode(file.read_bytes(), (kind,), (3 if colour else 1, *size))
    np.testing.assert_array_equal(samples.reshape(board.shape), board)


# --- which reader, and what becomes of the samples


def test_standardised_channels_have_mean_0_and_deviation_1():
    samples = assemble_samples(
        [(images(5000, 4, 4, 3), labels(5000), False), (images(10, 4, 4, 3, seed=1), labels(10), True)]
    )
    x = Preparation(pool=2).with_scaling(samples)(samples.take(range(5000)))
    assert np.allclose(x.mean((0, 2, 3)), 0, atol=1e-5)
    assert np.allclose(x.std((0, 2, 3)), 1, atol=1e-5)


def test_rows_are_gathered_across_parts():
    x = images(9, 2, 2)
    samples = Samples((x[:4], x[4:5], x[5:]), labels(9), np.zeros(9, bool))
    rows = [8, 0, 4, 4, 3, 5]
    assert np.array_equal(samples.take(rows), x[rows])
    with pytest.raises(DataError):
        samples.take([9])
    with pytest.raises(DataError):
        samples.take([-1])


def test_the_digest_tells_data_sets_apart():
    x, y = images(9, 2, 2), labels(9)
    samples = assemble_samples([(x, y, False)])
    assert samples.digest == Samples((x[:4], x[4:]), y, np.zeros(9, bool)).digest
    assert samples.digest != assemble_samples([(x, y, True)]).digest
    assert samples.digest != assemble_samples([(x, (y + 1) % 9, False)]).digest
    assert samples.digest != assemble_samples([(x, y, False)], owners=[y]).digest
    assert samples.digest != assemble_samples([(x ^ 1, y, False)]).digest


@pytest.mark.parametrize("name", ["x", "other"])
def test_a_zip_bomb_is_refused_where_it_would_be_read(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for member, array in {"x": images(4, 8, 8), "y": labels(4), "other": labels(9)}.items():
            file = io.BytesIO()
            np.save(file, array)
            archive.writestr(f"{member}.npy", file.getvalue())
        # What the directory of the archive promises.
        archive.getinfo(f"{name}.npy").file_size = 2**40
    if name == "other":
        assert len(read_npz(tmp_path / "a.npz")) == 4
        return
    with pytest.raises(DataError, match="x: size"):
        read_npz(tmp_path / "a.npz")


def test_transparent_images_are_drawn_on_the_background_of_the_settings(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(image_file(np.zeros((6, 5, 4), np.uint8)))
    for text, colour in (("#102030", (16, 32, 48)), ("black", (0, 0, 0)), (None, (255, 255, 255))):
        settings = {"source": str(tmp_path), "devices": 1, "least": 1, "partition": "iid", "test": 0}
        federation = DataPlan.from_dict(settings | ({} if text is None else {"background": text})).read()
        pixels = federation.load(federation.names[0]).x_train[0, :, 0, 0] * 255
        np.testing.assert_allclose(pixels, colour, atol=1e-4)
    with pytest.raises(ConfigError):
        DataPlan.from_dict({"source": "x", "devices": 1, "background": "blue"})

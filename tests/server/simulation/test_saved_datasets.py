"""Data sets as the library `datasets` keeps them: of `save_to_disk`, and folders of images with metadata."""

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fedprune.core.errors import DataError
from fedprune.model.lengths import PADDING
from fedprune_server.simulation.datasets.columns import ParquetColumns
from fedprune_server.simulation.datasets.decoding import Decoding
from fedprune_server.simulation.datasets.source import read_samples
from support.fakes.sample_files import image_file, wav

ROWS = 12
NAMES = ["cat", "dog"]


def pixels() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (ROWS, 6, 5, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def library() -> Any:
    """The library itself, which must not look for anything in a network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        return pytest.importorskip("datasets", reason="datasets is not installed")


def save(library: Any, folder: Path, rows: Any) -> Path:
    """Rows in reverse order, the last third of them as test split."""
    rows = rows.select(range(ROWS - 1, -1, -1))
    splits = {"train": rows.select(range(8)), "validation": rows.select(range(8, ROWS))}
    library.DatasetDict(splits).save_to_disk(folder / "all", num_shards={"train": 2, "validation": 1})
    splits["train"].save_to_disk(folder / "one")
    return folder


def test_images_and_numbers_are_read_as_they_were_saved(library: Any, tmp_path: Path) -> None:
    from PIL import Image

    columns = {
        "image": [Image.fromarray(p) for p in pixels()],
        "label": [0, 1] * 6,
        "heat": np.linspace(0, 1, ROWS),
        "tokens": [[n, n + 1, n + 2] for n in range(ROWS)],
        "maps": np.arange(ROWS * 4).reshape(ROWS, 2, 2),
    }
    features = {
        "image": library.Image(),
        "label": library.ClassLabel(names=NAMES),
        "heat": library.Value("float32"),
        "tokens": library.Sequence(library.Value("int64")),
        "maps": library.Array2D((2, 2), "float32"),
    }
    folder = save(library, tmp_path, library.Dataset.from_dict(columns, features=library.Features(features)))
    both, one = read_samples(folder / "all"), read_samples(folder / "one")
    assert (len(both), len(one), both.class_names, one.class_names) == (ROWS, 8, tuple(NAMES), tuple(NAMES))
    np.testing.assert_array_equal(both.is_test, [False] * 8 + [True] * 4)
    np.testing.assert_array_equal(both.take(range(ROWS)), pixels()[::-1])
    np.testing.assert_array_equal(both.labels, columns["label"][::-1])
    for name in ("tokens", "maps"):
        x = read_samples(folder / "all", ParquetColumns((name,))).take(range(ROWS))
        np.testing.assert_array_equal(x, np.array(columns[name])[::-1])


def test_recordings_have_the_length_that_is_asked_for_or_are_padded(library: Any, tmp_path: Path) -> None:
    lengths = np.arange(ROWS) * 100 + 400
    bodies = [wav(np.full(n, n // 4, np.int16).tobytes(), rate=8000) for n in lengths]
    folder = save(library, tmp_path, recordings(library, bodies)) / "all"
    padded = read_samples(folder, ParquetColumns(("sound",)), Decoding(audio_rate=8000)).take(range(ROWS))
    assert padded.shape == (ROWS, 1, 1500)
    np.testing.assert_array_equal((padded != PADDING).sum((1, 2)), lengths[::-1])
    np.testing.assert_allclose(padded[:, 0, 0], lengths[::-1] // 4 / 2**15)
    cut = read_samples(folder, ParquetColumns(("sound",)), Decoding(audio_rate=8000, seconds=0.1)).take(range(ROWS))
    np.testing.assert_array_equal((cut != 0).sum((1, 2)), np.minimum(lengths, 800)[::-1])
    save(library, tmp_path / "b", recordings(library, [b"x"] * ROWS))
    with pytest.raises(DataError) as error:
        read_samples(tmp_path / "b" / "all", ParquetColumns(("sound",)))
    assert "row 0 of 'sound'" in str(error.value)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("state.json", b"{}"),
        ("state.json", b'{"_data_files": [{"filename": "../x.arrow"}]}'),
        ("state.json", b'{"_data_files": [{"filename": "none.arrow"}]}'),
        ("dataset_dict.json", b'{"splits": ["/etc"]}'),
        ("dataset_dict.json", b'{"splits": "train"}'),
        ("data-00000-of-00001.arrow", b"ARROW1 no stream"),
        ("data-00000-of-00001.arrow", b""),
    ],
)
def test_a_damaged_or_hostile_folder_is_refused(library: Any, tmp_path: Path, name: str, body: bytes) -> None:
    library.Dataset.from_dict({"x": [[1.0], [2.0]], "label": [0, 1]}).save_to_disk(tmp_path / "set")
    columns = ParquetColumns(("x",))
    assert len(read_samples(tmp_path / "set", columns)) == 2
    (tmp_path / "set" / name).write_bytes(body)
    with pytest.raises(DataError) as error:
        read_samples(tmp_path / "set", columns)
    assert str(tmp_path) in str(error.value)


def recordings(library: Any, bodies: list[bytes]) -> Any:
    """Rows of the feature `Audio`, without the library's own encoder, which needs torch."""
    sounds = pa.array([{"bytes": body, "path": None} for body in bodies], library.Audio().pa_type)
    features = library.Features({"sound": library.Audio(), "label": library.ClassLabel(names=NAMES)})
    return library.Dataset(pa.table({"sound": sounds, "label": pa.array([0, 1] * 6)}, schema=features.arrow_schema))


def put(folder: Path, names: list[str]) -> None:
    for n, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image_file(pixels()[n]))


# The library leaves the metadata that it reads open.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_have_the_labels_and_owners_of_a_folder_of_images(library: Any, tmp_path: Path, kind: str) -> None:
    labels, whos = ["dog", "cat", "dog"], ["ann", "bob", "ann"]
    for split in ("train", "test"):
        names = [f"{n}.png" for n in range(3)]
        put(tmp_path / split, names)
        rows = [{"file_name": n, "label": y, "who": w} for n, y, w in zip(names, labels, whos, strict=True)]
        lines = [json.dumps(row) for row in rows]
        if kind == "csv":
            lines = ["\ufefffile_name,label,who", *(",".join(row.values()) for row in rows)]
        (tmp_path / split / f"metadata.{kind}").write_text("\n".join(lines))
    samples = read_samples(tmp_path, ParquetColumns(owner="who"))
    oracle = library.load_dataset("imagefolder", data_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    gc.collect()  # what the library left open must not be another test's warning
    for split, is_test in (("train", False), ("test", True)):
        rows = np.flatnonzero(samples.is_test == is_test)
        expected = oracle[split]
        np.testing.assert_array_equal(samples.take(rows), [np.asarray(image) for image in expected["image"]])
        assert [samples.class_names[y] for y in samples.labels[rows]] == list(expected["label"])
        assert [samples.owner_names[y] for y in samples.owners[rows]] == list(expected["who"])


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("file_name,label\n../0.png,1\n", "file_name"),
        ("file_name,label\n/etc/passwd,1\n", "file_name"),
        ("file_name,text\n0.png,a\n", "'label'"),
        ("name,label\n0.png,a\n", "'file_name'"),
        ("file_name,label\n0.png,\n", "the label"),
        ("file_name,label\n1.png,2\n", "1.png"),
        ("file_name,label\n", "no images"),
        ("file_name,label,who\n0.png,a\n", "the owner"),
    ],
)
def test_metadata_that_name_no_image_or_no_label_are_refused(tmp_path: Path, text: str, subject: str) -> None:
    put(tmp_path, ["0.png"])
    (tmp_path / "metadata.csv").write_text(text)
    columns = ParquetColumns(owner="who") if "who" in text else None
    with pytest.raises(DataError) as error:
        read_samples(tmp_path, columns)
    assert subject in str(error.value)

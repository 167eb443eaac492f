"""Parquet files that `datasets` wrote are read exactly; what is damaged, hostile or of another kind is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.errors import DataError
from fedprune_server.simulation.datasets import parquet_files
from fedprune_server.simulation.datasets.data_plan import DataPlan
from fedprune_server.simulation.datasets.source import read_samples
from support.nets import drawn_models  # noqa: F401 - its settings of Hypothesis

ROWS = 12
NAMES = ["cat", "dog"]
WHO = ["ann", "bob", "cleo"]


def pixels() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (ROWS, 6, 5, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def library() -> Any:
    """The library itself, which must not look for anything in a network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")  # not the hub's own setting, which would hold for other tests, too
        patch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        return pytest.importorskip("datasets", reason="datasets is not installed")


@pytest.fixture(scope="module")
def parquet_folder(library: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows in one file, and as the hub has them."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("parquet")
    features = library.Features(
        {
            "image": library.Image(),
            "label": library.ClassLabel(names=NAMES),
            "who": library.Value("string"),
            "maps": library.Array3D((1, 2, 2), "float32"),
            "tokens": library.List(library.Value("int64"), length=3),
            "uneven": library.List(library.Value("int64")),
            "heat": library.Value("float32"),
            "wind": library.Value("int16"),
            "gap": library.Value("int64"),
        }
    )
    columns = {
        "image": [Image.fromarray(p) for p in pixels()],
        "label": [0, 1] * 6,
        "who": WHO * 4,
        "maps": np.arange(ROWS * 4).reshape(ROWS, 1, 2, 2),
        "tokens": [[n, n + 1, n + 2] for n in range(ROWS)],
        "uneven": [[1] * (1 + n % 2) for n in range(ROWS)],
        "heat": np.linspace(0, 1, ROWS),
        "wind": range(ROWS),
        "gap": [None, *range(1, ROWS)],
    }
    rows = library.Dataset.from_dict(columns, features=features)
    (folder / "hub" / "data").mkdir(parents=True)
    rows.select(range(5)).to_parquet(folder / "hub" / "data" / "train-00000-of-00002.parquet")
    rows.select(range(5, 8)).to_parquet(folder / "hub" / "data" / "train-00001-of-00002.parquet")
    rows.select(range(8, 12)).to_parquet(folder / "hub" / "data" / "test-00000-of-00001.parquet")
    rows.to_parquet(folder / "all.parquet")
    return folder


def plan(source: Path, **columns: Any) -> DataPlan:
    return DataPlan.from_dict({"source": str(source), "devices": 1, "least": 1, "partition": "iid", **columns})


@pytest.mark.parametrize(("name", "tests"), [("hub", 4), ("all.parquet", 0)])
def test_images_classes_and_splits_are_the_librarys(parquet_folder: Path, name: str, tests: int) -> None:
    read = read_samples(parquet_folder / name)

    assert np.array_equal(read.take(range(ROWS)), pixels())
    assert read.labels.tolist() == [0, 1] * 6
    assert read.class_names == ("cat", "dog")
    assert read.is_test.tolist() == [False] * (ROWS - tests) + [True] * tests


@pytest.mark.parametrize("name", ["hub", "all.parquet"])
def test_columns_are_chosen_by_name(parquet_folder: Path, name: str) -> None:
    maps = plan(parquet_folder / name, x="maps", owner="who").read().samples
    assert np.array_equal(maps.take(range(ROWS)), np.arange(ROWS * 4, dtype=np.float32).reshape(ROWS, 1, 2, 2))
    assert maps.owners is not None
    assert [maps.owner_names[o] for o in maps.owners] == WHO * 4

    tokens = plan(parquet_folder / name, x="tokens", y="who").read().samples
    assert tokens.take([0, 11]).tolist() == [[0, 1, 2], [11, 12, 13]]
    assert tokens.dtype == np.int64
    assert [tokens.class_names[label] for label in tokens.labels] == WHO * 4

    several = plan(parquet_folder / name, x=["heat", "wind"]).read().samples
    assert several.dtype == np.float32
    assert several.take([11]).tolist() == [[1.0, 11.0]]
    assert plan(parquet_folder / name, x="heat").read().samples.shape == (1,)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"x": "picture"}, "'picture'"),
        ({"x": "who"}, "'who'"),
        ({"x": "uneven"}, "'uneven'.* 1 to 2"),
        ({"x": ["heat", "tokens"]}, "heat, tokens"),
        ({"x": "gap"}, "'gap'.* got 1"),
        ({"y": "heat"}, "'heat'.* got float"),
    ],
)
def test_what_can_not_be_read_is_named(parquet_folder: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as raised:
        plan(parquet_folder / "all.parquet", **columns).read()
    assert str(parquet_folder / "all.parquet") in str(raised.value)


def test_an_images_path_is_never_opened(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array([{"bytes": None, "path": "/etc/hostname"}] * 2, kind), "label": [0, 1]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"'image'.* got 2"):
        read_samples(tmp_path / "a.parquet")


def test_a_small_file_that_unfolds_to_a_huge_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 2**20
    pq.write_table(pa.table({"x": np.zeros(rows), "label": np.zeros(rows, int)}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 2**17
    monkeypatch.setattr(parquet_files, "MAX_DATA_BYTES", 2**20)
    with pytest.raises(DataError, match="1048576 bytes"):
        plan(tmp_path / "a.parquet", x="x").read()


@given(data=st.data())
def test_damage_is_an_error_or_does_not_matter(parquet_folder: Path, data: st.DataObject) -> None:
    raw = bytearray((parquet_folder / "all.parquet").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))
    path = parquet_folder / "damaged.parquet"
    path.write_bytes(raw[:cut])
    try:
        plan(path, x="maps", owner="who").read()
    except DataError as error:
        assert str(path) in str(error)  # noqa: PT017
    finally:
        path.unlink()

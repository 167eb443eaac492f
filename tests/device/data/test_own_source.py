import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedprune_device
from fedprune.core.errors import DataError
from fedprune.model.lengths import PADDING, Lengths
from fedprune_device import ArrayType, DataSource, Schema
from fedprune_device.data.array_source import load_data, load_inputs
from fedprune_device.data.labels import Targets
from fedprune_device.data.reservoir import SampleLimits
from fedprune_device.data.sample_store import SampleStore
from fedprune_device.data.source_samples import SourceSamples
from fedprune_device.data.sources import SampleOptions
from fedprune_device.data.splits import SplitShares
from fedprune_device.data.stored_array import StoredArray

pytestmark = pytest.mark.board


class Source:
    """Sample n has n everywhere, and the class n modulo 3."""

    def __init__(self, count: int = 100, shape: tuple[int, ...] = (2,), **arrays: Any) -> None:
        self.count, self.shape, self.arrays = count, shape, arrays
        self.reads = 0

    def schema(self) -> Schema:
        return Schema({"x": ArrayType(self.shape), "y": ArrayType((), "int64")}, ("a", "b", "c"))

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Any) -> dict[str, Any]:
        self.reads += len(indices)
        x = np.broadcast_to(indices.reshape(-1, *[1] * len(self.shape)), (len(indices), *self.shape))
        return {"x": x.astype("f4"), "y": indices % 3} | self.arrays


def options(**values: Any) -> SampleOptions:
    return SampleOptions(
        **{
            "data": "", "device": "a", "seed": 0, "validation_share": 0.0, "test_share": 0.2, "class_names": (),
            "image_mean": (0.0,), "image_deviation": (1.0,), "audio_rate": 16000, "samples_most": 10_000,
        } | values
    )  # fmt: skip


def test_a_class_of_three_methods_is_a_boards_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_boards.py").write_text(
        "import numpy as np\n"
        "from fedprune_device import ArrayType, Schema\n"
        "class Board:\n"
        "    def __init__(self, device): self.device = device\n"
        "    def schema(self): return Schema({'x': ArrayType((2,)), 'y': ArrayType((), 'int64')})\n"
        "    def __len__(self): return 50\n"
        "    def read(self, indices):\n"
        "        return {'x': np.full((len(indices), 2), len(self.device), 'f4'), 'y': indices % 2}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = options(data="my_boards:Board", device="abc").fixed().snapshot((2,), Targets("cross_entropy", 2))
    assert (np.asarray(data.x_train) == 3).all()
    assert len(data.y_train) + len(data.y_test) == 50
    assert len(load_data("my_boards:Board", device="abc").y_test) == len(data.y_test) > 0
    assert len(load_inputs("my_boards:Board")[0]) == 50


def test_new_samples_are_there_at_the_next_round_and_old_ones_keep_their_part() -> None:
    source = Source(60)
    samples = SourceSamples(source, "s", SplitShares(0.3, 0.2), 10_000)
    before = samples.snapshot()
    source.count = 200
    after = samples.snapshot()
    assert after.samples == samples.samples > before.samples
    for split in ("train", "test", "val"):
        old, new = (set(np.asarray(getattr(data, f"x_{split}"))[:, 0]) for data in (before, after))
        assert old
        assert old <= new
    np.testing.assert_array_equal(after.y_train, after.x_train[:, 0].astype(int) % 3)


def test_each_sample_is_read_once_and_large_ones_lie_on_the_disk(tmp_path: Path) -> None:
    source = Source(700, (120, 60))
    samples = SourceSamples(source, "s", SplitShares(0.1), 600, spool=tmp_path)
    data = samples.snapshot((120, 60))
    assert source.reads == 350
    assert len(samples.notes) == 1
    assert isinstance(data.x_train, StoredArray)
    np.testing.assert_array_equal(np.asarray(data.x_train)[:, 5, 5].astype(int) % 3, data.y_train)


def test_inputs_of_a_model_of_several_and_lengths_are_joined() -> None:
    class Pair(Source):
        def schema(self) -> Schema:
            return Schema({"b": ArrayType((3,)), "a": ArrayType((1,)), "y": ArrayType((2,))})

        def read(self, indices: Any) -> dict[str, Any]:
            n = indices[:, None].astype("f4")
            return {"b": np.repeat(n, 3, 1) + 0.5, "a": n, "y": np.repeat(n, 2, 1)}

    x = np.asarray(SourceSamples(Pair(), "s", SplitShares(0), 99999).snapshot().x_train)
    np.testing.assert_array_equal(x, np.arange(100)[:, None] + np.array([0, 0.5, 0.5, 0.5]))

    class Padded(Source):
        def schema(self) -> Schema:
            return Schema({"x": ArrayType((4,)), "lengths": ArrayType((), "int64"), "y": ArrayType((), "int64")})

        def read(self, indices: Any) -> dict[str, Any]:
            return {"x": np.ones((len(indices), 4), "f4"), "lengths": indices % 4 + 1, "y": indices % 2}

    data = SourceSamples(Padded(), "s", SplitShares(0), 99999).snapshot((Lengths(1, 6),), Targets("cross_entropy", 2))
    np.testing.assert_array_equal((np.asarray(data.x_train) == np.float32(PADDING)).sum(1), 5 - np.arange(100) % 4)


def test_labels_become_the_fleets_numbers_of_their_names() -> None:
    data = SourceSamples(Source(), "s", SplitShares(0), 99999, ("c", "a", "x", "b")).snapshot()
    np.testing.assert_array_equal(data.y_train, np.array([1, 3, 0])[np.arange(100) % 3])
    with pytest.raises(DataError, match="classes of s"):
        SourceSamples(Source(), "s", SplitShares(0), 99999, ("a", "b"))


class Broken(Source):
    def __init__(self, schema: Any) -> None:
        super().__init__()
        self.wrong = schema

    def schema(self) -> Any:
        return self.wrong


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (Source(x=np.zeros((3, 2), "f4")), "as the schema says"),
        (Source(y=np.zeros(100)), "array 'y'"),
        (Source(y=np.full(100, 3)), "0 to 2"),
        (Source(x=np.full((100, 2), np.nan, "f4")), "not finite"),
        (Source(0), "empty"),
        (Broken({"x": (2,)}), "Schema"),
        (Broken(Schema({"y": ArrayType()})), "names"),
        (Broken(Schema({"x_left": ArrayType(), "b": ArrayType()})), "x_"),
        (Broken(Schema({"x": ArrayType((2,), "text")})), "numbers"),
        (Broken(Schema({"x": ArrayType((0,))})), "sizes"),
        (Broken(Schema({"x": ArrayType((2,)), "z": ArrayType((2,))})), "z"),
    ],
)
def test_what_a_source_does_wrong_is_said_by_its_name(source: Source, text: str) -> None:
    with pytest.raises(DataError, match=text) as caught:
        SourceSamples(source, "mine:Source", SplitShares(0), 99999, ("c", "a", "b")).snapshot()
    assert "mine:Source" in str(caught.value)


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (lambda indices: np.zeros((100, 2), "f4"), "a dict with x, y"),
        (lambda indices: None, "a dict with x, y"),
        (lambda indices: {"y": np.zeros(100, "i8")}, "a dict with x, y"),
        (lambda indices: 1 / 0, r"read failed \(ZeroDivisionError"),
    ],
)
def test_a_source_that_gives_no_arrays_is_an_error_of_ours(read: Any, text: str) -> None:
    source: Any = Source()
    source.read = read
    with pytest.raises(DataError, match=text):
        SourceSamples(source, "s", SplitShares(0), 99999).snapshot()


def test_the_samples_of_every_source_are_one_for_a_model(tmp_path: Path) -> None:
    rows = np.arange(80, dtype=np.float32).reshape(40, 2)
    (tmp_path / "a.csv").write_text("a,b,class\n" + "".join(f"{a},{b},{int(a) % 3}\n" for a, b in rows))
    np.savez(tmp_path / "a.npz", x=rows[:, :, None], y=rows[:, 0].astype(int) % 3)
    store = SampleStore(tmp_path / "store", SampleLimits(99, 2**20), SplitShares(0))
    for row in rows:
        store.add(row[:, None], int(row[0]) % 3)
    targets = Targets("cross_entropy", 3)
    for source in (options(data=str(tmp_path / "a.csv")).fixed(), options(data=str(tmp_path / "a.npz")).fixed(), store):
        data = source.snapshot((2, 1), targets)
        assert isinstance(data, DataSource)
        assert data.schema() == Schema({"x": ArrayType((2, 1)), "y": ArrayType((), "int64")})
        samples = data.read(np.arange(1, len(data), 2))
        np.testing.assert_array_equal(samples["y"], samples["x"][:, 0, 0].astype(int) % 3)
        np.testing.assert_array_equal(samples["x"], np.asarray(data.x_train)[1::2])
        again = SourceSamples(data, "again", SplitShares(0), 99).snapshot((2, 1), targets)
        np.testing.assert_array_equal(again.x_train, np.asarray(data.x_train))
    store.close()


def test_the_example_reads_what_its_logger_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = runpy.run_path(str(Path(__file__).parents[3] / "examples" / "own_source.py"))
    records = np.zeros(40, example["RECORD"])
    records["x"] = np.random.default_rng(0).standard_normal((40, 3, 128))
    records["y"] = np.arange(40) % 3
    records.tofile(tmp_path / "log")
    monkeypatch.setenv("FEDPRUNE_VIBRATIONS", str(tmp_path / "log"))
    data = SourceSamples(example["Vibrations"](), "s", SplitShares(0), 99999, ("broken", "still", "worn")).snapshot()
    np.testing.assert_array_equal(data.x_train, records["x"])
    np.testing.assert_array_equal(data.y_train, (records["y"] + 1) % 3)
    assert {"ArrayType", "DataSource", "Schema"} <= set(fedprune_device.__all__)

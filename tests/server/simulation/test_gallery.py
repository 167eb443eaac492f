"""The gallery's examples: the commands of their pages run, on small made-up data and for one round."""

import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gallery
from support.processes.machine import free_port

pytestmark = pytest.mark.torch


def made_up(folder: Path) -> None:
    """Data sets of the right shapes, in which every class is a place on the image, or a level of the signals."""
    rng = np.random.default_rng(0)

    def images(name: str, shape: tuple[int, ...], classes: int, each: int) -> None:
        y = np.repeat(np.arange(classes), each)
        x = rng.integers(0, 64, (len(y), *shape), np.uint8)
        for place, label in enumerate(y % 10):
            x[place, 2 * label : 2 * label + 4, 2 * label : 2 * label + 4] += 160
        halves = {"train": slice(0, None, 2), "test": slice(1, None, 2)}
        np.savez(folder / name, **{f"{a}_{k}": v[s] for k, s in halves.items() for a, v in (("x", x), ("y", y))})

    images("fashion_mnist", (28, 28), 10, 40)
    images("cifar10", (32, 32, 3), 10, 30)
    images("cifar100", (32, 32, 3), 100, 4)
    windows, activities, people = [], [], []
    for person in range(1, 24):
        for recording in range(12):
            signal = rng.normal(recording % 6, 1, (9, 64 * 4)).astype(np.float32)
            windows += [signal[:, 64 * i : 64 * i + 128] for i in range(3)]
            activities += [recording % 6] * 3
            people += [person] * 3
    np.savez(folder / "har", x=windows, y=activities, subject=people, is_test=np.array(people) > 21)


def shorten_job(folder: Path) -> None:
    """Let a job end after one round of one epoch, with few people."""
    for name in ("fleet.toml", "sweep.toml"):
        text = (folder / name).read_text().replace("count = 21", "count = 4")
        for key, value in {"rounds": 1, "epochs": 1, "evaluate_every": 1, "deadline_s": 600}.items():
            text = re.sub(rf"\b{key} = \d+", f"{key} = {value}", text)
        (folder / name).write_text(text)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as FEDPRUNE_DATA, with made-up data."""
    folder = tmp_path_factory.mktemp("data")
    made_up(folder)
    return folder


@pytest.fixture
def work(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run examples in."""
    monkeypatch.setenv("FEDPRUNE_DATA", str(data))
    return tmp_path


def test_every_example_is_on_the_gallerys_page_and_the_other_way_round() -> None:
    page = (gallery.ROOT / "docs" / "gallery.md").read_text()
    named = set(re.findall(r"\.\./examples/([a-z_]+)/README\.md\)", page))
    assert named == {p.parent.name for p in (gallery.ROOT / "examples").glob("*/README.md")} == set(gallery.EXAMPLES)
    for picture in re.findall(r"\((images/gallery-[^)]+)\)", page):
        assert (gallery.ROOT / "docs" / picture).stat().st_size < 300_000, picture


@pytest.mark.soak
@pytest.mark.system
@pytest.mark.parametrize("example", gallery.EXAMPLES)
def test_an_examples_commands_run_as_they_stand_there(example: str, work: Path) -> None:
    folder = gallery.copied(example, work)
    shorten_job(folder)
    port = free_port()
    for block in gallery.blocks((folder / "README.md").read_text()):
        text = block.replace("fedprune-server run ", f"fedprune-server run --port {port} ")
        text = re.sub("--rounds 8", "--rounds 1", text.replace("mqtts://127.0.0.1", f"mqtts://127.0.0.1:{port}"))
        gallery.run(text.replace("pretrain.py", "pretrain.py --epochs 1"), folder)
    assert all((folder / picture).is_file() for picture in gallery.PICTURES[example])

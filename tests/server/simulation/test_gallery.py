"""The gallery's examples: the commands of their pages run, on small made-up data and for one round."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gallery
from fedprune.core.errors import ExitCode
from fedprune_device.cli import main as device
from fedprune_export.cli import main as export
from fedprune_server.cli import main as server
from fedprune_server.cli import simulate
from fedprune_server.simulation.fleet.simulated_fleet import read_plan
from fedprune_server.simulation.results.run_folder import simulate as simulate_run
from fedprune_server.simulation.sweep import read_sweep
from support.processes.machine import free_port

pytestmark = pytest.mark.torch

MAIN = {"fedprune-export": export.main, "fedprune-simulate": simulate.main, "fedprune-device": device.main}


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


def shortened(folder: Path) -> None:
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
def work(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to run examples in."""
    monkeypatch.setenv("FEDPRUNE_DATA", str(data))
    modules, path = set(sys.modules), list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name in {"net", "vit", "people"}:
            del sys.modules[name]


def lines(page: str) -> list[list[str]]:
    """The words of all commands of a page's blocks; of a loop's body for its first board."""
    found = []
    for block in gallery.blocks(page):
        boards = re.search(r"for board in (\S+)", block)
        text = block.replace("\\\n", " ").replace("$board", boards[1] if boards else "")
        found += [shlex.split(line.rstrip(" &")) for line in text.splitlines()]
    return [words for words in found if words[0] not in ("for", "done", "wait")]


def carry_out(words: list[str]) -> None:
    """A command, in this process; what needs a server or boards is only read."""
    prog, *rest = words
    if prog == "python":
        short = ["--epochs", "1"] if rest == ["pretrain.py"] else []
        subprocess.run([sys.executable, *rest, *short], check=True, timeout=600)
    elif prog == "fedprune-simulate" and rest[0] == "sweep":
        first, *others = read_sweep(Path(rest[1]))  # all are read; `make soak` simulates all
        changes, out = first.settings["changes"], Path(rest[-1])
        record = simulate_run(read_plan(Path("fleet.toml"), seed=0, changes=changes), out / first.name)
        assert len(record.rounds) == 1
        assert set(record.last.local) == {d.name for d in record.devices}
        for run in others:
            shutil.copytree(out / first.name, out / run.name)
    elif prog == "fedprune-server":
        server.build_parser().parse_args(rest)
        if rest[0] == "export-model":
            shutil.copyfile("model.onnx", rest[-1])
    elif prog == "fedprune-device" and rest[0] == "run":
        device.build_parser().parse_args(rest)
    else:
        assert MAIN[prog](rest) == ExitCode.OK


# One at every push; all of them soak, as they stand there.
@pytest.mark.parametrize(
    "example", [n if n == "motion_on_zeros" else pytest.param(n, marks=pytest.mark.soak) for n in gallery.EXAMPLES]
)
@pytest.mark.soak
def test_an_examples_commands_run(example: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = gallery.copied(example, work)
    shortened(folder)
    monkeypatch.chdir(folder)
    commands = lines((folder / "README.md").read_text())
    assert {words[0] for words in commands} >= {"python", "fedprune-export", "fedprune-simulate"}
    for words in commands:
        carry_out(words)
    drawn = {p for p in gallery.PICTURES[example] if p != "runs/comparison.html"}  # the sweep's own
    assert all(Path(p).is_file() for p in drawn)


def test_every_example_is_on_the_gallerys_page_and_the_other_way_round() -> None:
    page = (gallery.ROOT / "docs" / "gallery.md").read_text()
    named = set(re.findall(r"\.\./examples/([a-z_]+)/README\.md\)", page))
    there = {p.parent.name for p in (gallery.ROOT / "examples").glob("*/README.md")}
    assert named == there == set(gallery.EXAMPLES)
    for picture in re.findall(r"\((images/gallery-[^)]+)\)", page):
        assert (gallery.ROOT / "docs" / picture).stat().st_size < 300_000, picture


@pytest.mark.soak
@pytest.mark.system
@pytest.mark.parametrize("example", gallery.EXAMPLES)
def test_an_examples_commands_run_as_they_stand_there(example: str, work: Path) -> None:
    folder = gallery.copied(example, work)
    shortened(folder)
    port = free_port()
    for block in gallery.blocks((folder / "README.md").read_text()):
        text = block.replace("fedprune-server run ", f"fedprune-server run --port {port} ")
        text = re.sub("--rounds 8", "--rounds 1", text.replace("mqtts://127.0.0.1", f"mqtts://127.0.0.1:{port}"))
        gallery.run(text.replace("pretrain.py", "pretrain.py --epochs 1"), folder)
    assert all((folder / picture).is_file() for picture in gallery.PICTURES[example])

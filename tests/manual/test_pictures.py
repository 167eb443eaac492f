"""Pictures of measured numbers show those that lie here, and README has the figures of the run that is drawn."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from fedprune_server.simulation.results.report import claims
from manual import demo, pictures
from support.paths import ROOT

NOT_MEASURED = ("console-", "report-", "partition")
"""Pictures of pages whose boards and numbers are made up, and of a way to deal out samples."""

FOLDERS = ("docs/images", "benchmarks/results")


def test_every_picture_of_measured_numbers_shows_them() -> None:
    assert pictures.stale(ROOT) == {}


def test_every_picture_has_its_numbers_or_shows_none() -> None:
    png = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.png")]
    measured = {str(path.relative_to(ROOT)) for path in png if not path.name.startswith(NOT_MEASURED)}
    assert measured == pictures.SOURCES.keys()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """What the check reads, which a test may change."""
    for path in pictures.SOURCES:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    for source in pictures.SOURCES.values():
        shutil.copy(ROOT / "benchmarks/results" / source.results, tmp_path / "benchmarks/results")
    return tmp_path


def test_numbers_that_are_measured_again_make_their_picture_stale(repository: Path) -> None:
    path = repository / "benchmarks/results/tasks.json"
    body = json.loads(path.read_text())
    body["runs"]["speech"]["torch"]["0"]["curve"][-1] -= 0.01
    path.write_text(json.dumps(body))
    assert pictures.stale(repository).keys() == {"docs/images/task-speech.png"}


def test_a_picture_that_is_drawn_by_hand_is_stale_and_a_stamp_changes_no_pixel(repository: Path) -> None:
    picture = repository / "benchmarks/results/privacy.png"
    with Image.open(picture) as image:
        image.convert("RGB").save(picture)
        before = image.convert("RGB").tobytes()
    assert pictures.stale(repository).keys() == {"benchmarks/results/privacy.png"}

    for _ in range(2):  # a second stamp replaces the first
        pictures.stamp(picture, json.loads((repository / "benchmarks/results/privacy.json").read_text())["rows"])
    assert pictures.stale(repository) == {}
    with Image.open(picture) as image:
        assert image.convert("RGB").tobytes() == before


def test_readme_shows_the_run_that_it_draws_and_that_run_holds_what_readme_claims() -> None:
    fleet, reference = demo.records(ROOT)
    shown = (ROOT / demo.PAGE).read_text(encoding="utf-8")
    assert [str(claim) for claim in claims(fleet, reference)] == re.findall(r"^    (PASS: .*)$", shown, re.MULTILINE)
    assert f"({demo.IMAGE})" in shown


def test_the_curves_end_where_the_figures_say() -> None:
    fleet, reference = demo.records(ROOT)
    drawn = demo.drawing((fleet, reference))
    ends = [float(line.split()[-1].split(",")[0]) for line in re.findall(r'<polyline [^>]*points="([^"]+)"', drawn)]
    starts = [float(x) for x in re.findall(r'<text class="title" x="(\d+)"', drawn)]
    # The last two charts are by bytes: how far the fleet's curve goes is its share of FedAvg's bytes.
    own, whole = (end - starts[-1] for end in ends[-2:])
    share = (fleet.last.down + fleet.last.up) / (reference.last.down + reference.last.up)
    assert own / whole == pytest.approx(share, abs=0.001)

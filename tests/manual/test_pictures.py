"""Pictures of measured numbers show those that lie here, and README has the figures of the run that is drawn."""

from manual import pictures
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

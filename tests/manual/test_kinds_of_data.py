import json

import pytest

from benchmarks.data_folders.__main__ import KINDS, STREAMS, read_kind
from support.paths import ROOT

# As the page of results shows them.
RESULTS = {row["kind"]: row for row in json.loads((ROOT / "benchmarks/results/data_folders.json").read_text())["rows"]}


@pytest.mark.parametrize("kind", [*KINDS, *STREAMS])
def test_no_kind_of_data_is_misread(kind: str) -> None:
    record = read_kind(kind)
    assert record["outcome"] in ("taken", "rewritten", "left out in part", "refused"), record["said"]
    assert record["outcome"] == RESULTS[kind]["outcome"], record["said"]

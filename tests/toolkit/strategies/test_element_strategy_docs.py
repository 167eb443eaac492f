"""docs/strategies: the pages of FedOBP, AutoFLIP and FIARSE name every option, and no other."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from fedprune.strategies import PRESETS
from fedprune.strategies.methods import autoflip, fedobp, fiarse
from support.paths import ROOT

PAGES = ROOT / "docs" / "strategies"

OPTIONS = {"autoflip": autoflip.Options, "fedobp": fedobp.Options, "fiarse": fiarse.Options}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_page_has_a_row_for_every_option(name: str) -> None:
    text = (PAGES / f"{name}.md").read_text()
    assert name in PRESETS
    assert f'strategy = "{name}"' in text
    rows = [line.split("|")[1] for line in text.partition("## Options")[2].splitlines() if line.startswith("| `")]
    named = [word for row in rows for word in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(f.name for f in fields(OPTIONS[name]))

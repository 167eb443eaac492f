"""The pages of strategies name every option, with its default."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import pytest

from fedprune.jobs.job import Job
from fedprune.strategies import PRESETS
from fedprune.strategies.methods import (
    asynchronous,
    autoflip,
    ca_hfp,
    fedavg,
    fedobp,
    fedper,
    fedprune,
    fiarse,
    heterofl,
    pr_fl,
    subflot,
)
from fedprune.strategies.methods.robust import Robustness
from support.paths import ROOT

PAGES = ROOT / "docs/strategies"

TABLES = [
    ("fedavg", (fedavg.ProximalOptions,), {}),
    ("heterofl", (heterofl.Options,), {}),
    ("ca-hfp", (ca_hfp.Options,), {}),
    ("fedper", (fedper.Options, fedper.LocalOptions, fedper.HistoryOptions), {"personal": "`@head`"}),
    ("subflot", (subflot.Options,), {}),
    ("fedprune", (fedprune.Options,), dict.fromkeys(("core", "dropout", "mixup"), "by the fleet")),
    ("robust", (Robustness,), {"check": "none"}),
    ("fedasync", (asynchronous.OneByOne,), {}),
    ("fedbuff", (asynchronous.Buffers,), {}),
    ("fedfix", (asynchronous.Windows,), {}),
    ("fedobp", (fedobp.Options,), {}),
    ("autoflip", (autoflip.Options,), {}),
    ("fiarse", (fiarse.Options,), {"densities": "1, 1/4, 1/16, 1/64"}),
    ("pr-fl", (pr_fl.Options,), {"rungs": "`add`"}),
]


def said(page: str) -> dict[str, str]:
    """Defaults by option. A row may have several options, and a default for each, or one for all."""
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8").partition("## Options")[2]
    out: dict[str, str] = {}
    for names, default in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([^|]+?) \|", text, re.MULTILINE):
        options, values = re.findall(r"\w+", names), default.split(", ")
        out |= zip(options, values if len(values) == len(options) else [default] * len(options), strict=True)
    return out


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value == ():
        return "empty"
    return f"{value:g}" if isinstance(value, (int, float)) else f"`{value}`"


@pytest.mark.parametrize(("page", "kinds", "others"), TABLES, ids=[t[0] for t in TABLES])
def test_a_page_names_every_option_and_its_default(page: str, kinds: Any, others: dict[str, str]) -> None:
    expected = {f.name: shown(f.default) for kind in kinds for f in fields(kind)} | others
    assert said(page) == expected


def test_fedrolex_has_heterofl_s_options_and_one_more() -> None:
    more = {f.name for f in fields(heterofl.RollingOptions)} - {f.name for f in fields(heterofl.Options)}
    assert said("fedrolex").keys() == more


def test_plain_names_the_keys_that_it_reads() -> None:
    keys = ("density", "scorer", "warmup_rounds", "rule", "server_momentum")
    assert said("plain") == {f.name: shown(f.default) for f in fields(Job) if f.name in keys}


def test_the_index_has_every_strategy_and_every_page() -> None:
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    linked = {
        n: page
        for names, page in re.findall(r"\[([^\]]+)\]\(([\w-]+\.md)\)", index)
        for n in re.findall(r"`([\w-]+)`", names)
    }
    assert linked.keys() == {*PRESETS, "robust"}
    assert set(linked.values()) == {p.name for p in PAGES.glob("*.md")} - {"README.md"}

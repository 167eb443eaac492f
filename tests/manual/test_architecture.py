"""The pages about the architecture name files that exist and every room of the import contracts."""

import re

import pytest

from support.paths import ROOT

SOURCES = ("toolkit", "export", "device_runtime", "server")
PAGES = ("architecture.md", "concurrency.md")


def missing(names: list[str]) -> list[str]:
    return [name for name in names if not any((ROOT / source / name).exists() for source in SOURCES)]


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    names = re.findall(r"`(fedprune\w*/[\w./-]+)`", (ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert len(names) > 50
    assert missing(names) == []

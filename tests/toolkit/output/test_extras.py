"""Commands that install extras work: they name the clone or the wheel, not an index that lacks fedprune."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path

import pytest

from fedprune.core.errors import MissingExtraError
from fedprune.output.extras import install_command
from support.paths import ROOT


class Installed:
    """What pip notes of an installation."""

    def __init__(self, body: object) -> None:
        self._text = body if body is None or isinstance(body, str) else json.dumps(body)

    def read_text(self, name: str) -> str | None:
        return self._text if name == "direct_url.json" else None


def command(body: object, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Installed(body))
    return install_command("console")


def test_from_a_clone_it_is_the_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = tmp_path / "a clone"
    clone.mkdir()
    (clone / "constraints.txt").touch()
    body = {"url": clone.as_uri(), "dir_info": {}}
    assert command(body, monkeypatch) == f"pip install -c '{clone}/constraints.txt' '{clone}[console]'"
    body["dir_info"] = {"editable": True}
    assert command(body, monkeypatch) == f"pip install -c '{clone}/constraints.txt' -e '{clone}[console]'"


def test_from_a_wheel_it_is_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "fedprune-0.1.0-py3-none-any.whl"
    wheel.touch()
    assert command({"url": wheel.as_uri(), "archive_info": {}}, monkeypatch) == f"pip install '{wheel}[console]'"


@pytest.mark.parametrize(
    "body", [None, "no json", {}, {"url": "https://example.com/f.whl"}, {"url": "file:///gone/clone", "dir_info": {}}]
)
def test_where_the_source_is_unknown_or_gone_it_is_a_clone(body: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command(body, monkeypatch) == "pip install -c constraints.txt '.[console]' (in a clone of fedprune)"


def test_an_error_ends_with_the_command() -> None:
    assert str(MissingExtraError("torch is missing", extra="torch")).endswith(install_command("torch"))
    assert str(MissingExtraError("torch is missing", extra="torch", hint="Or don't.")).startswith(
        "torch is missing. Or don't. pip install"
    )


FOR_THE_DAY_OF_AN_INDEX = (ROOT / "CHANGELOG.md", ROOT / "docs" / "install.md", ROOT / "docs" / "release.md")


@pytest.mark.parametrize("folder", ["docs", "examples", "deploy", "server", "export", "toolkit", "device_runtime", "."])
def test_nobody_is_told_to_install_from_an_index(folder: str) -> None:
    found = re.compile(r"(?:pip install|Install)[^\n]*['\" ]fedprune\[")
    files = (ROOT / folder).glob("*.md") if folder == "." else (ROOT / folder).rglob("*")
    wrong = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in files
        if path.suffix in (".py", ".md", ".html", ".toml", ".yaml", ".txt") and path not in FOR_THE_DAY_OF_AN_INDEX
        for line in path.read_text(encoding="utf-8").splitlines()
        if found.search(line)
    ]
    assert not wrong

"""The site builds without a warning, without a network, and asks for nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fedprune
import fedprune_device
import fedprune_export
import fedprune_server
from support.paths import ROOT

pytest.importorskip("mkdocs")
pytest.importorskip("material")
pytest.importorskip("mkdocstrings")


_NO_NETWORK = """
import socket
def refuse(*_, **__): raise OSError("the site is built without a network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli()
"""

NEEDS = {"https://unpkg.com/mermaid": 'class="mermaid"', "https://api.github.com": 'data-md-component="source"'}
"""What the theme's program would load, and what a page must have for it to do so."""


def build(out: Path, at: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _NO_NETWORK, "build", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=at, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built in its strict mode: a link or anchor that leads nowhere is an error."""
    out = tmp_path_factory.mktemp("site")
    done = build(out)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return out


@pytest.mark.soak
def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 60
    tags = re.compile(r"<(?:script|img|link|iframe|source|video|audio|object|embed)\b[^>]*>")
    for page in pages:
        text = page.read_text(encoding="utf-8")
        outside = [tag for tag in tags.findall(text) if re.search(r"""(?:src|href|data)=["']?(?:https?:)?//""", tag)]
        assert outside == [], page
        assert not [need for need in NEEDS.values() if need in text], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"""(?:url\(|@import\s*)["']?(?:https?:)?//""", sheet.read_text(encoding="utf-8")), sheet


def test_every_page_of_docs_is_in_the_menu_and_the_python_page_has_the_names(site: Path) -> None:
    home = (site / "index.html").read_text(encoding="utf-8")
    pages = [p for p in (ROOT / "docs").rglob("*.md") if p.name != "README.md"]
    assert [p for p in pages if p.relative_to(ROOT).with_suffix(".html").as_posix() not in home] == []
    python = (site / "docs" / "reference" / "python.html").read_text(encoding="utf-8")
    for package in (fedprune, fedprune_device, fedprune_export, fedprune_server):
        names = [f"{package.__name__}.{name}" for name in package.__all__]
        assert [name for name in names if f'id="{name}"' not in python] == []
    assert (site / "docs" / "schemas" / "asyncapi.json").is_file()

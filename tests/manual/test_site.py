"""The site builds without a warning, without a network, and asks for nothing from elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import fedprune
import fedprune_device
import fedprune_export
import fedprune_server
from manual.site import BESIDE
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


def test_the_site_has_the_project_s_mark(site: Path) -> None:
    mark = "server/fedprune_server/web/static/mark.svg"
    assert (site / mark).read_bytes() == (ROOT / mark).read_bytes()
    page = (site / "docs" / "planner.html").read_text(encoding="utf-8")
    assert re.search(rf'<link rel="icon" href="../{mark}">', page)
    assert re.search(rf'<img src="../{mark}" alt="logo">', page)


def test_programs_of_the_site_load_nothing_from_elsewhere(site: Path) -> None:
    """What the theme's own program names beyond what it needs, and credits of its parts, is a new finding."""
    credited = ("https://clipboardjs.com/", "https://unpkg.com/resize-observer-polyfill")
    (bundle,) = site.glob("assets/javascripts/bundle.*.js")
    for url in re.findall(r"https?://[\w./@-]+", bundle.read_text(encoding="utf-8")):
        assert url.startswith((*NEEDS, *credited)), url


def test_every_page_of_docs_is_in_the_menu_and_the_python_page_has_the_names(site: Path) -> None:
    home = (site / "index.html").read_text(encoding="utf-8")
    pages = [p for p in (ROOT / "docs").rglob("*.md") if p.name != "README.md"]
    assert [p for p in pages if p.relative_to(ROOT).with_suffix(".html").as_posix() not in home] == []
    python = (site / "docs" / "reference" / "python.html").read_text(encoding="utf-8")
    for package in (fedprune, fedprune_device, fedprune_export, fedprune_server):
        names = [f"{package.__name__}.{name}" for name in package.__all__]
        assert [name for name in names if f'id="{name}"' not in python] == []
    assert (site / "docs" / "schemas" / "asyncapi.json").is_file()


@pytest.mark.soak
@pytest.mark.parametrize("target", ["nowhere.md", "#no-such-place", "protocol.md#no-such-place", "../server/none.py"])
def test_a_link_that_leads_nowhere_ends_the_build(tmp_path: Path, target: str) -> None:
    """In a copy: what is checked must be able to fail."""
    for name in ("docs", "manual", "benchmarks", "examples", "toolkit", "device_runtime", "export", "server"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", *(name for name in BESIDE if "/" not in name)):
        shutil.copy(ROOT / name, tmp_path / name)
    with (tmp_path / "docs" / "planner.md").open("a") as file:
        file.write(f"\n[there]({target})\n")
    done = build(tmp_path / "out", at=tmp_path)

    assert done.returncode != 0
    (warning,) = re.findall("WARNING.*", done.stderr)
    assert "docs/planner.md" in warning
    assert target in warning


@contextmanager
def served(folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.soak
def test_a_browser_asks_nobody_else_and_finds_what_is_searched(site: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = Path("/usr/bin/chromium")
    if not chromium.exists():
        pytest.skip("chromium is not installed")
    with served(site) as address, playwright.sync_playwright() as session:
        browser = session.chromium.launch(executable_path=str(chromium), args=["--no-sandbox"])
        page = browser.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        for path in ("index.html", "docs/protocol.html", "docs/reference/python.html"):
            page.goto(f"{address}/{path}", wait_until="networkidle")
        page.keyboard.press("/")
        page.keyboard.type("broker-config")
        page.wait_for_selector(".md-search-result__item", timeout=60_000)  # first a thread of the page builds the index
        browser.close()

    assert len(asked) > 10
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []

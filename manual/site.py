"""What MkDocs is told beyond mkdocs.yml: the site has the repository's paths, so that one link is right in both.

Pages outside docs/ (README, changes, measurements) are part of it, and so is what they show and link to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
BESIDE = (
    "README.md",
    "CHANGELOG.md",
    "CODE_OF_CONDUCT.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "SECURITY.md",
    "benchmarks/**/*.md",
    "benchmarks/**/*.json",
    "benchmarks/**/*.png",
    "examples/*.*",
    "examples/*/README.md",
    "examples/*/*.toml",
    "examples/*/*.json",
    "examples/*/*.py",
    "examples/*/*.ipynb",
    "server/fedprune_server/web/static/mark.svg",
)
"""What is part of the site beside docs/."""

_MEASURED = "benchmarks/results/"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leave out of the menu what may be missing, and is."""
    config.nav = _there(config.nav or [], config.extra.get("may_be_missing", []))
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """All files of the site, by their paths in the repository."""
    docs = Path(config.docs_dir)
    found = []
    for file in files:
        path = Path(file.abs_src_path) if file.abs_src_path else None
        ours = path is not None and path.is_relative_to(docs)
        found.append(_file(config, path) if ours and path is not None else file)
    beside = sorted({path for pattern in BESIDE for path in ROOT.glob(pattern)})
    return Files([*found, *(_file(config, path) for path in beside)])


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Keep tables of measurements out of the search, which they would fill."""
    if page.file.src_uri.startswith(_MEASURED):
        page.meta["search"] = {"exclude": True}
    return markdown


def _file(config: MkDocsConfig, path: Path) -> File:
    return File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path))


def _there(entries: list[Any], missing: list[str]) -> list[Any]:
    """A menu without the entries whose pages may be missing and are."""
    kept = []
    for entry in entries:
        title, inner = next(iter(entry.items())) if isinstance(entry, dict) else (None, entry)
        if isinstance(inner, list):
            kept.append({title: _there(inner, missing)})
        elif inner not in missing or (ROOT / inner).is_file():
            kept.append(entry)
    return kept

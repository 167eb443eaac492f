"""The files that are made from the code and from measured numbers, and whether those that lie here are."""

from __future__ import annotations

from pathlib import Path

from benchmarks import tables
from manual import asyncapi, command_pages, demo, message_schemas, python_page, rooms, setting_pages

SCHEMAS = "docs/schemas"
_ROOT = Path(__file__).resolve().parent.parent


def files() -> dict[str, str]:
    """What each file should hold, by its path in the repository."""
    schemas = {**message_schemas.files(), "asyncapi.json": message_schemas.written(asyncapi.document())}
    return {
        "docs/reference/cli.md": command_pages.page(),
        "docs/reference/python.md": python_page.page(),
        "docs/reference/settings.md": setting_pages.page(),
        f"{SCHEMAS}/README.md": message_schemas.page(),
        **{f"{SCHEMAS}/{name}": text for name, text in schemas.items()},
        **rooms.files(_ROOT),
        **demo.files(_ROOT),
        **tables.files(_ROOT),
    }


def stale(root: Path) -> list[str]:
    """The files that are missing or hold something else, and those that nobody writes any more.

    Args:
        root: The repository.
    """
    wanted = files()
    wrong = [name for name, text in wanted.items() if not _holds(root / name, text)]
    left = [f"{SCHEMAS}/{p.name}" for p in (root / SCHEMAS).glob("*.json")]
    return [*wrong, *(name for name in left if name not in wanted)]


def write(root: Path) -> list[str]:
    """Write the files that are not up to date, and delete those that nobody writes any more; returns their paths.

    Args:
        root: The repository.
    """
    wanted = files()
    changed = stale(root)
    for name in changed:
        path = root / name
        if name in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[name], encoding="utf-8")
        else:
            path.unlink()
    return changed


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text

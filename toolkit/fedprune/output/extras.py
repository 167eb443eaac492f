"""The command that installs an extra, from the clone or wheel of this installation: no package index has fedprune."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import unquote, urlsplit


def install_command(extra: str) -> str:
    """A command line for pip that installs an extra (or several, with commas) here.

    It names the clone or wheel of this installation. If neither is known or still there, it is for any clone and says
    so.
    """
    source, editable = _installed_from()
    # With the constraints, so that an extra doesn't bring other versions than the tests have seen.
    if source is not None and source.is_dir() and (source / "constraints.txt").is_file():
        mode = "-e " if editable else ""
        return f"pip install -c '{source / 'constraints.txt'}' {mode}'{source}[{extra}]'"
    if source is not None and source.suffix == ".whl" and source.is_file():
        return f"pip install '{source}[{extra}]'"
    return f"pip install -c constraints.txt '.[{extra}]' (in a clone of fedprune)"


def _installed_from() -> tuple[Path | None, bool]:
    """The clone or wheel that pip installed fedprune from, and whether it is installed in place."""
    from importlib.metadata import PackageNotFoundError, distribution  # boards start faster without it

    try:
        body = json.loads(distribution("fedprune").read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, OSError, ValueError):
        return None, False
    url = urlsplit(str(body.get("url", "")))
    if url.scheme != "file":
        return None, False
    return Path(unquote(url.path)), bool(body.get("dir_info", {}).get("editable"))

"""The swarm's numbers as a page."""

from __future__ import annotations

from typing import Any


def page(rows: list[dict[str, Any]], about: dict[str, Any], settings: dict[str, Any]) -> str:
    return "# Swarm\n"

"""deploy/compose.yaml as `docker compose` reads it, and its services with paths, hosts and ports of this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from support.paths import ROOT

DEPLOY = ROOT / "deploy"
_VARIABLE = re.compile(r"\$\$|\$\{(\w+)(?::([-?])([^}]*))?\}")


def interpolated(value: Any, environment: Mapping[str, str]) -> Any:
    """A part of the file with its variables; `$$` is a dollar, and a variable that is wanted must be there."""

    def put(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        if environment.get(found[1]):
            return environment[found[1]]
        if found[2] != "-":
            raise KeyError(f"{found[1]}: {found[3]}")
        return found[3]

    if isinstance(value, dict):
        return {k: interpolated(v, environment) for k, v in value.items()}
    if isinstance(value, list):
        return [interpolated(v, environment) for v in value]
    return _VARIABLE.sub(put, value) if isinstance(value, str) else value


def read_compose(environment: Mapping[str, str], folder: Path = DEPLOY) -> dict[str, Any]:
    """The file with its variables and merged keys."""
    body: dict[str, Any] = interpolated(yaml.safe_load((folder / "compose.yaml").read_text()), environment)
    return body


def mounts(body: Mapping[str, Any], service: str, folder: Path) -> dict[str, Path]:
    """Where a service's paths lie: volumes in `folder/volumes`, its own files and secrets where the file says.

    Args:
        body: The file.
        service: The service.
        folder: The file's folder, as a user has it.
    """
    targets = {}
    service_body = body["services"][service]
    for text in service_body.get("volumes", []):
        source, target = text.split(":")[:2]
        targets[target] = folder / source if source.startswith(".") else folder / "volumes" / source
    for name in service_body.get("secrets", []):
        targets[f"/run/secrets/{name}"] = folder / body["secrets"][name]["file"]
    for text in service_body.get("tmpfs", []):
        target = text.split(":")[0]
        if target != "/tmp":
            targets[target] = folder / "tmpfs" / service / target.strip("/")
    return targets


def remapped(value: Any, places: Mapping[str, str]) -> Any:
    """A part of the file with other texts for some; the longest first."""
    if isinstance(value, dict):
        return {k: remapped(v, places) for k, v in value.items()}
    if isinstance(value, list):
        return [remapped(v, places) for v in value]
    for text in sorted(places, key=len, reverse=True):
        value = value.replace(text, places[text])
    return value

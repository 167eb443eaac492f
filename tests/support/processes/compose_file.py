"""deploy/compose.yaml as `docker compose` reads it, and its services with paths, hosts and ports of this machine."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from support.paths import ROOT

DEPLOY = ROOT / "deploy"
_VARIABLE = re.compile(r"\$\$|\$\{(\w+)(?::([-?])([^}]*))?\}")


def fill_in_variables(value: Any, environment: Mapping[str, str]) -> Any:
    """A part of the file with its variables; `$$` is a dollar, and a variable that is wanted must be there."""

    def put(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        if environment.get(match[1]):
            return environment[match[1]]
        if match[2] != "-":
            raise KeyError(f"{match[1]}: {match[3]}")
        return match[3]

    if isinstance(value, dict):
        return {k: fill_in_variables(v, environment) for k, v in value.items()}
    if isinstance(value, list):
        return [fill_in_variables(v, environment) for v in value]
    return _VARIABLE.sub(put, value) if isinstance(value, str) else value


def read_compose(environment: Mapping[str, str], folder: Path = DEPLOY) -> dict[str, Any]:
    """The file with its variables and merged keys."""
    body: dict[str, Any] = fill_in_variables(yaml.safe_load((folder / "compose.yaml").read_text()), environment)
    return body


def mounts(body: Mapping[str, Any], service: str, folder: Path) -> dict[str, Path]:
    """Where a service's paths lie: volumes in `folder/volumes`, its own files and secrets where the file says."""
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


def replace_texts(value: Any, replacements: Mapping[str, str]) -> Any:
    """A part of the file with other texts for some; the longest first."""
    if isinstance(value, dict):
        return {k: replace_texts(v, replacements) for k, v in value.items()}
    if isinstance(value, list):
        return [replace_texts(v, replacements) for v in value]
    for text in sorted(replacements, key=len, reverse=True):
        value = value.replace(text, replacements[text])
    return value

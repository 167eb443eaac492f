"""What GitHub and a visitor read in the repository fits the project: versions, workflows, forms, badges."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedprune import __version__
from fedprune.core.toml_file import parse_toml
from support.paths import ROOT

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").iterdir())
PROJECT = parse_toml((ROOT / "pyproject.toml").read_text())["project"]

MAKE = re.compile(r"\bmake((?: +-\S+)*)((?: +[a-z][\w-]*)+)")
"""A call of make in a line of a shell."""


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def jobs(path: Path) -> dict[str, dict[str, Any]]:
    jobs_by_name: dict[str, dict[str, Any]] = read(path)["jobs"]
    return jobs_by_name


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in jobs(path).values() for step in job["steps"]]


def called_targets(path: Path) -> set[str]:
    """Targets of make that a workflow calls, also by `.ci/run`."""
    targets = set()
    for job in jobs(path).values():
        for line in (step.get("run", "") for step in job["steps"]):
            for _, words in MAKE.findall(line):
                targets |= set(words.split())
            if ".ci/run" in line:
                assert line == ".ci/run ${{ matrix.target }}"
                targets |= set(job["strategy"]["matrix"]["target"])
    return targets


def test_workflows_call_targets_that_make_has() -> None:
    make_targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets = {path.name: called_targets(path) for path in WORKFLOWS}
    assert targets["ci.yml"] == {"check", "docs", "test-board", "test-dev"}
    assert targets["weekly.yml"] == {"soak", "test-arm64"}
    assert targets["release.yml"] == {"release", "notes"}
    assert set.union(*targets.values()) <= make_targets


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_a_workflow_may_do_little(path: Path) -> None:
    body = read(path)
    assert body["permissions"] == {"contents": "read"}
    job_permissions = {name: job["permissions"] for name, job in body["jobs"].items() if "permissions" in job}
    expected = {"pypi": {"id-token": "write"}, "github": {"contents": "write"}} if path.stem == "release" else {}
    assert job_permissions == expected
    assert all(job["timeout-minutes"] <= 180 for job in body["jobs"].values())
    used = [step for step in steps(path) if "uses" in step]
    assert [step["uses"] for step in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])] == []
    checkouts = [step for step in used if step["uses"].startswith("actions/checkout@")]
    assert [step for step in checkouts if step["with"]["persist-credentials"]] == []
    version_comments = re.findall(r"uses: \S+@\S+(.*)", path.read_text())
    assert [text for text in version_comments if not re.fullmatch(r" # v\d+\.\d+\.\d+", text)] == []


def test_one_version_is_named_everywhere() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert PROJECT["version"] == __version__
    assert (citation["version"], citation["license"]) == (__version__, PROJECT["license"])
    assert citation["keywords"] == PROJECT["keywords"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == __version__  # type: ignore[index]
    for page in ("deploy", "exit-codes", "install", "join", "release"):
        text = (ROOT / "docs" / f"{page}.md").read_text()
        versions = re.findall(r"(?:\bfedprune(?:-server|-board)?[:@-]v?|\bv)(\d+\.\d+\.\d+)", text)
        assert set(versions) == {__version__}, page

"""What GitHub and a visitor read in the repository fits the project: versions, workflows, forms, badges."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedprune import __version__
from fedprune.core.toml_file import parse_toml
from support.marks import marked
from support.paths import ROOT

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").iterdir())
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").iterdir())
PROJECT = parse_toml((ROOT / "pyproject.toml").read_text())["project"]

MAKE = re.compile(r"\bmake((?: +-\S+)*)((?: +[a-z][\w-]*)+)")
"""A call of make in a line of a shell."""


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def jobs(path: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = read(path)["jobs"]
    return found


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in jobs(path).values() for step in job["steps"]]


def called(path: Path) -> set[str]:
    """Targets of make that a workflow calls, also by `.ci/run`."""
    found = set()
    for job in jobs(path).values():
        for line in (step.get("run", "") for step in job["steps"]):
            for _, targets in MAKE.findall(line):
                found |= set(targets.split())
            if ".ci/run" in line:
                assert line == ".ci/run ${{ matrix.target }}"
                found |= set(job["strategy"]["matrix"]["target"])
    return found


def test_a_mark_for_a_parameter_that_a_test_does_not_have_is_an_error() -> None:
    """A misspelt name would lose its mark, and run at every push."""
    assert [p.marks for p in marked(["a", ("b", "x")], soak=["b"])] == [[], [pytest.mark.soak]]
    for row in ("a", ("a", "b")):
        with pytest.raises(ValueError, match=r"to mark: b$"):
            marked([row], soak=["b"])


def test_workflows_call_targets_that_make_has() -> None:
    known = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets = {path.name: called(path) for path in WORKFLOWS}
    assert targets["ci.yml"] == {"check", "docs", "test-board", "test-dev"}
    assert targets["weekly.yml"] == {"soak", "test-arm64"}
    assert targets["release.yml"] == {"release", "notes"}
    assert set.union(*targets.values()) <= known


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda p: p.stem)
def test_a_workflow_may_do_little(path: Path) -> None:
    body = read(path)
    assert body["permissions"] == {"contents": "read"}
    more = {name: job["permissions"] for name, job in body["jobs"].items() if "permissions" in job}
    expected = {"pypi": {"id-token": "write"}, "github": {"contents": "write"}} if path.stem == "release" else {}
    assert more == expected
    assert all(job["timeout-minutes"] <= 180 for job in body["jobs"].values())
    used = [step for step in steps(path) if "uses" in step]
    assert [step["uses"] for step in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])] == []
    checkouts = [step for step in used if step["uses"].startswith("actions/checkout@")]
    assert [step for step in checkouts if step["with"]["persist-credentials"]] == []
    said = re.findall(r"uses: \S+@\S+(.*)", path.read_text())
    assert [text for text in said if not re.fullmatch(r" # v\d+\.\d+\.\d+", text)] == []


@pytest.mark.parametrize("path", FORMS, ids=lambda p: p.stem)
def test_a_form_has_what_github_wants(path: Path) -> None:
    form = read(path)
    assert {"name", "description", "body"} <= form.keys() <= {"name", "description", "body", "labels"}
    assert all(field["type"] in ("markdown", "textarea", "input", "checkboxes") for field in form["body"])
    asked = [field for field in form["body"] if field["type"] != "markdown"]
    assert all(field["attributes"]["label"] for field in asked)
    assert len({field["id"] for field in asked}) == len(asked)
    assert any(field.get("validations", {}).get("required") for field in asked)
    for field in form["body"]:
        if field["type"] == "checkboxes":
            assert all(option["label"] for option in field["attributes"]["options"])
        elif field["type"] == "markdown":
            assert field["attributes"]["value"]


def test_packages_are_updated_by_hand() -> None:
    assert [update["package-ecosystem"] for update in read(GITHUB / "dependabot.yml")["updates"]] == ["github-actions"]


def test_pages_that_github_s_texts_name_exist() -> None:
    texts = [p.read_text(encoding="utf-8") for p in (*FORMS, *WORKFLOWS, GITHUB / "pull_request_template.md")]
    named = {name for text in texts for name in re.findall(r"\b(?:docs/)?[\w-]+\.md\b", text)} - {"NOTES.md"}
    assert {"SECURITY.md", "CHANGELOG.md", "docs/add-a-board.md"} <= named
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_one_version_is_named_everywhere() -> None:
    citation = read(ROOT / "CITATION.cff")
    assert PROJECT["version"] == __version__
    assert (citation["version"], citation["license"]) == (__version__, PROJECT["license"])
    assert citation["keywords"] == PROJECT["keywords"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == __version__  # type: ignore[index]
    assert f"latest minor version ({__version__.rpartition('.')[0]})" in (ROOT / "SECURITY.md").read_text()
    assert f"### {__version__.rpartition('.')[0]}." in (ROOT / "docs" / "compatibility.md").read_text()
    for page in ("deploy", "exit-codes", "install", "join", "release"):
        text = (ROOT / "docs" / f"{page}.md").read_text()
        shown = re.findall(r"(?:\bfedprune(?:-server|-board)?[:@-]v?|\bv)(\d+\.\d+\.\d+)", text)
        assert set(shown) == {__version__}, page


def test_the_notes_are_the_introduction_of_the_version_s_changes() -> None:
    done = subprocess.run(["make", "--silent", "notes"], cwd=ROOT, capture_output=True, text=True, check=True)
    notes, changes = done.stdout.strip(), (ROOT / "CHANGELOG.md").read_text()
    assert notes
    assert notes in changes
    section = changes.partition(f"## {__version__}")[2].partition("\n")[2].lstrip()
    assert section.startswith(notes)
    assert "](docs/" not in notes  # a release's page is elsewhere
    assert not re.search(r"^- ", notes, re.MULTILINE)


def test_badges_are_files_that_say_what_is_so() -> None:
    shown = re.findall(r"!\[([^\]]+)\]\((docs/images/badges/[\w-]+\.svg)\)", (ROOT / "README.md").read_text())
    assert {Path(path).name for _, path in shown} == {p.name for p in (ROOT / "docs" / "images" / "badges").iterdir()}
    said = {}
    for text, path in shown:
        name, value = text.split(": ")
        drawn = re.findall(r"<text[^>]*>([^<]+)</text>", (ROOT / path).read_text())
        assert [part.lower() for part in drawn] == [name.lower(), value.lower()]
        said[name] = value
    assert said["Licence"] == PROJECT["license"]
    assert said["Python"] == PROJECT["requires-python"].removeprefix(">=") + "+"
    assert said["Types"] == "mypy strict"
    assert "Typing :: Typed" in PROJECT["classifiers"]

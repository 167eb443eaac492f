"""Releases, and an installed board, which no test may change."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support.fakes.runtime_releases import make_release, set_up


@pytest.fixture(scope="session")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("releases")
    return {n: make_release(folder / str(n), n) for n in (1, 2, 3, 4)}


@pytest.fixture(scope="session")
def fresh(releases: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A board with release 1."""
    root = tmp_path_factory.mktemp("fresh") / "board"
    set_up(root, releases[1])
    return root


@pytest.fixture
def copy_board(fresh: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make a copy of that board."""
    return lambda name="board": Path(shutil.copytree(fresh, tmp_path / name))

"""Kits of tiny wheels for this machine."""

import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedprune_flash import BoardSettings, BoardTarget, Kit, build_kit, open_kit
from support.fakes.runtime_releases import KEY
from support.fakes.tiny_wheels import fleet_of_wheels

HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.fixture(autouse=True)
def sbin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where sfdisk, mke2fs and fsck.fat are, which is not on everybody's path."""
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin:/sbin")


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    fleet_of_wheels(folder)
    return folder


@pytest.fixture(scope="session")
def plain_kit(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Path:
    """A kit without a claim, which no test may change."""
    board = BoardSettings("mqtts://broker.example:8883", "attic", "lab")
    fedprune_wheel = next(wheels.glob("fedprune-*.whl"))
    out = tmp_path_factory.mktemp("kit") / "kit"
    return build_kit(
        out, board, BoardTarget(HERE, platform.machine()), wheel=fedprune_wheel, links=[wheels], signer=KEY
    ).folder


@pytest.fixture
def kit(tmp_path: Path, plain_kit: Path) -> Kit:
    """A kit of the test's own."""
    return open_kit(Path(shutil.copytree(plain_kit, tmp_path / "kit")))


@pytest.fixture
def make_kit(tmp_path: Path, wheels: Path) -> Callable[..., Kit]:
    """Make a kit for this machine; what is named is changed."""

    def make(
        name: str = "kit", *, target: BoardTarget | None = None, board: BoardSettings | None = None, **changes: Any
    ) -> Kit:
        return build_kit(
            tmp_path / name,
            board or BoardSettings("mqtts://broker.example:8883", "attic", "lab"),
            target or BoardTarget(HERE, platform.machine()),
            **{"wheel": next(wheels.glob("fedprune-*.whl")), "links": [wheels], "signer": KEY, **changes},
        )

    return make

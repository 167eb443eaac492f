from pathlib import Path
from typing import Any

import pytest

from fedprune.core.errors import ConfigError, StorageError
from fedprune.planning import profile_store
from fedprune.planning.profile import HardwareProfile
from fedprune.runtime.tensorrt_config import EnginePlan
from fedprune_device.cli import main
from fedprune_device.engines.board_tier import BoardTier, board_tier

pytestmark = pytest.mark.board


def tier_of(*options: str, profile: HardwareProfile | None = None) -> BoardTier:
    arguments = main.build_parser().parse_args(["run", "--state", "s", "--data", "d.npz", *options])
    return board_tier(arguments.tier, arguments.engine_plan, profile)


@pytest.mark.parametrize(
    ("options", "profile", "tier", "cuda", "engines"),
    [
        ((), None, "onnxruntime-cpu", False, False),
        ((), "raspberry-pi-5", "onnxruntime-cpu", False, False),
        ((), "jetson-orin-nano", "tensorrt", True, True),
        (("--tier", "onnxruntime-cuda"), "jetson-orin-nano", "onnxruntime-cuda", True, False),
        (("--tier", "onnxruntime-cpu"), "jetson-orin-nano", "onnxruntime-cpu", False, False),
        (("--tier", "tensorrt"), "generic-x86-64", "tensorrt", True, True),
    ],
)
def test_the_profile_says_what_computes_unless_the_command_line_does(
    tmp_path: Path, options: Any, profile: str | None, tier: str, cuda: bool, engines: bool
) -> None:
    choice = tier_of(*options, profile=None if profile is None else profile_store.find_profile(profile))
    assert (choice.name, choice.cuda) == (tier, cuda)
    assert (choice.selector(tmp_path) is not None) == engines
    assert list(tmp_path.iterdir()) == []


def test_a_plan_comes_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    with pytest.raises(StorageError, match=r"engine\.json"):
        tier_of("--engine-plan", str(path))
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"engine\.json"):
        tier_of("--engine-plan", str(path))
    path.write_text(EnginePlan(level=1).to_json())
    assert tier_of("--engine-plan", str(path), "--tier", "tensorrt").selector(tmp_path).plan.level == 1

"""What virtual devices train with, by name.

`onnxruntime` is what boards have and gives a board's bits. `torch` computes the same numbers but for rounding, faster
on many models; `torch:cuda` does so for many devices at once. `torch:cuda:1/64` names the GPU and how many devices.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import ConfigError, shown
from fedprune_export.pruning.model import Model
from fedprune_server.simulation.fleet.virtual_device import Bench

ONNXRUNTIME = "onnxruntime"

MANY = 32
"""How many devices a GPU works out at once, if nothing else is said."""

_TORCH = re.compile(r"torch(?::(cpu|cuda(?::[0-9]{1,3})?))?(?:/([1-9][0-9]{0,3}))?")


@dataclass(frozen=True)
class Choice:
    """A trainer.

    Attributes:
        torch: Whether it is torch's; else it is onnxruntime.
        device: Where torch computes.
        together: How many devices are worked out at once.
    """

    torch: bool = False
    device: str = "cpu"
    together: int = 1


def choice(name: str) -> Choice:
    """The trainer of a name.

    Raises:
        ConfigError: There is none.
    """
    if name == ONNXRUNTIME:
        return Choice()
    found = _TORCH.fullmatch(name) if isinstance(name, str) else None
    if found is None:
        raise ConfigError(
            "trainer", expected="'onnxruntime', 'torch', 'torch:cuda', or such as 'torch:cuda:1/64'", got=shown(name)
        )
    device = found[1] or "cpu"
    return Choice(True, device, int(found[2] or (1 if device == "cpu" else MANY)))


def checked(trainer: str, workers: int) -> Choice:
    """The trainer of a name, if it works in so many processes.

    Raises:
        ConfigError: There is none, or it doesn't.
    """
    chosen = choice(trainer)
    if workers > 1 and chosen.together > 1:
        raise ConfigError(
            f"trainer {trainer!r} in {workers} processes",
            expected="1",
            hint="It works out many devices at once already; run several simulations side by side instead.",
        )
    return chosen


def bench(trainer: str, workers: int, model: Model, store: BlobStore, folder: Path) -> Bench:
    """A bench.

    Args:
        trainer: The trainer's name.
        workers: In how many processes devices are worked out.
        model: The model.
        store: Where offers' blobs lie and updates are put.
        folder: A folder for scratch files.

    Raises:
        ConfigError: There is no such trainer, or it doesn't work in several processes.
        MissingExtraError: torch is not installed.
        RuntimeUnavailableError: torch doesn't have the device.
    """
    chosen = checked(trainer, workers)
    if workers > 1:
        from fedprune_server.simulation.fleet.pooled_runner import PooledBench

        return PooledBench(trainer, workers, model, store, folder)
    if not chosen.torch:
        return Bench(store, folder)
    from fedprune_server.simulation.fleet.torch_runner import TorchBench

    return TorchBench(model, store, folder, device=chosen.device, together=chosen.together)

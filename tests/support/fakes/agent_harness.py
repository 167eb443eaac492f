"""An agent on a state directory, and its server."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedprune.blobs.blob_ref import BlobRef
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune.wire.messages import RoundProgress
from fedprune_device.agent.agent import Agent
from fedprune_device.board import AgentSettings, build_agent
from fedprune_device.data.dataset import LocalData
from fedprune_device.network.connection import BoardConnection, MessageChannel
from fedprune_device.privacy.policy import PrivacyPolicy
from fedprune_device.storage.state_directory import DeviceStore
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_task import TrainingTask
from support.fakes.agent_fleet import MemoryLink, MemoryServer, clock

LONG = Recipe(epochs=5000, batch_size=1, lr=1e-4)


def agent_on(
    store: DeviceStore,
    link: Any,
    data: Any,
    *,
    device: str = "d",
    site: str = "site",
    clock: Callable[[], float] = clock,
    **settings: Any,
) -> Agent:
    """An agent on a link of a test, without signatures."""
    connection = BoardConnection(link, MessageChannel(device, site))
    return build_agent(connection, store, data, AgentSettings(**settings), clock=clock)


class Bench:
    """An agent that can be started again and again on one state directory, and its server."""

    def __init__(self, root: Path, graphs: Path, weights: Tensors, data: LocalData, blobs: Path | None = None) -> None:
        self.root, self.data = root, data
        self.server = MemoryServer(blobs or root / "server", graphs, weights)
        self.store: DeviceStore | None = None
        self.agent: Agent | None = None
        self.profile: Any = None
        self.floor: PrivacyPolicy | None = None

    def run(self, until_finished: bool = True, limit: float = 60.0, **settings: Any) -> None:
        with DeviceStore(self.root / "state") as self.store:
            self.store.apply_policy(self.floor)
            self.agent = agent_on(self.store, MemoryLink(self.server), self.data, profile=self.profile, **settings)
            late = threading.Timer(limit, self.agent.stop)
            late.start()
            self.agent.run(until_finished)
            assert late.is_alive(), f"not done after {limit} s: {self.server.seen[-5:]}"
            late.cancel()

    def stop_on(self, kind: type, **fields: Any) -> None:
        def react(message: Any) -> None:
            if isinstance(message, kind) and all(getattr(message, k) == v for k, v in fields.items()):
                self.agent.stop()

        self.server.react = react

    def run_until(self, kind: type, **fields: Any) -> Any:
        """Run until a message of this kind has these fields; returns the first one."""
        self.stop_on(kind, **fields)
        self.run(until_finished=False)
        return next(m for m in self.server.of(kind) if fields.items() <= {k: getattr(m, k) for k in fields}.items())

    def stop_once_quiet(self) -> None:
        def watch() -> None:
            if self.agent.is_quiet:
                self.agent.stop()

        self.server.watch = watch

    def damage(self, blob: BlobRef | None = None) -> Path:
        """Begin a long round, end in its midst, and let the disk damage a blob of its offer: the weights by default."""
        self.server.plan = [self.server.offer(1, LONG)]
        self.run_until(RoundProgress, phase="train")
        self.server.react = lambda _: None
        with self.reopen_store() as store:
            damaged = store.blobs.path((blob or self.server.weights).sha256)
        damaged.write_bytes(b"rot")
        return damaged

    def reopen_store(self) -> DeviceStore:
        return DeviceStore(self.root / "state")


def expected_tensors(
    graphs: Path, weights: Tensors, data: LocalData, number: int, recipe: Recipe | None = None
) -> Tensors:
    trainer = Trainer(graphs / "plain.onnx")
    recipe = recipe or Recipe(epochs=2, batch_size=16)
    return trainer.train(weights, data, TrainingTask(recipe, seed=7, device="d", round=number, classes=3)).tensors


def same(left: Any, right: Any) -> bool:
    return list(left) == list(right) and all(left[n].tobytes() == right[n].tobytes() for n in left)

"""Boards that mask, of the same parts as real ones but for the training, and all that they send to a server."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.core import tensorfile
from fedprune.jobs.job import Job
from fedprune.model.selection import Tensors
from fedprune.secure_aggregation.vector_form import MaskedForm
from fedprune.updates.clipped_noise import GaussianNoise, add_noise
from fedprune.wire.messages import (
    Accepted,
    Cancelled,
    Offer,
    SecureStep,
    TrainingDone,
    UpdateAnnouncement,
    parse_message,
)
from fedprune_device.network.backoff import Backoff
from fedprune_device.network.connection import BoardConnection, MessageChannel
from fedprune_device.network.secure_update import SecureUpdate
from fedprune_device.network.uplink import Uplink
from fedprune_export.pruning.model import Model
from fedprune_server.engine.runnable_job import RunnableJob
from fedprune_server.engine.server import Server
from fedprune_server.executor.worker import Worker
from support.fakes.fleet import Air, Fleet, ToyDevice, server_of
from support.fakes.masked_cohort import Transcript

STATISTICS = ("mean", "var")


class MaskingBoard(ToyDevice):
    """A board that trains by chance. It masks its update where the offer says so."""

    def __init__(self, name: str, folder: Path, air: Air) -> None:
        super().__init__(name, folder, air)
        connection = BoardConnection(self, MessageChannel(name, "default"))  # type: ignore[arg-type]
        self.secure = SecureUpdate(connection, Uplink(connection), self.store)
        self.announcements = Backoff()
        self.residual: Tensors = {}
        self.vector = b""
        """Its last update, not masked."""
        self.stops_at = ""
        """The step of a sum, or `vector`, at which the board stops answering, or `trained`."""
        self.skips = ""
        """The step of a sum that the board never answers, though it answers everything else."""
        self.spoil_vector: Callable[[bytes], bytes] | None = None
        """Changes the masked vector that it hands in."""
        self.spoil: Callable[[SecureStep], SecureStep] = lambda message: message
        """Changes what the board hears."""

    # A link, as `Connection` needs it.

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        self.air.to_server(topic, payload)
        return True

    def hear(self, topic: str, payload: bytes) -> None:
        message = None if self.topics.parse(topic).channel == "down/blob" else parse_message(payload)
        if isinstance(message, SecureStep):
            self.heard.append(message)
            if message.step == self.stops_at:
                self.silent = True
            if not self.silent and message.step != self.skips:
                self.step(self.spoil(message))
            return
        if self.silent and message is not None:
            self.heard.append(message)
            return
        super().hear(topic, payload)
        offer = self.offer
        current = None if offer is None else (offer.round, offer.attempt)
        if isinstance(message, (Accepted, Cancelled)) and (message.round, message.attempt) == current:
            self.secure.drop()

    def step(self, message: SecureStep) -> None:
        before = self.secure.sum_id
        masked = self.secure.receive(message, self.air.now)
        if self.secure.sum_id != before:
            self.pending = None
        if masked is not None and self.stops_at == "vector":
            self.silent = True
        elif masked is not None:
            if self.spoil_vector is not None:
                spoilt = self.spoil_vector(self.store.read(masked.weights.sha256))
                masked = replace(masked, weights=self.store.put(spoilt))
            self.pending = masked
            self.resend()

    def train(self) -> None:
        offer = self.offer
        if offer is None or not all(p.is_done for p in self.pulls.values()) or not self.pulls:
            return
        self.pulls = {}
        if self.stops_at == "trained":
            return
        sent = tensorfile.decode(self.store.read(offer.weights.sha256))
        # What a board makes of a submodel in a round is the same each time.
        seed = hashlib.sha256(f"{self.name} {offer.round}".encode()).digest()[:4]
        dice = np.random.default_rng(int.from_bytes(seed, "big"))
        tensors = {n: (v + 0.05 * dice.standard_normal(v.shape)).astype(np.float32) for n, v in sent.items()}
        tensors = {n: np.abs(v) if n.endswith("var") else v for n, v in tensors.items()}
        if clip := offer.recipe.get("update_clip"):
            noise = GaussianNoise.from_key(self.name, offer.round)
            names = [name for name in sent if not name.endswith(STATISTICS)]
            tensors = add_noise(tensors, sent, names, clip, offer.recipe.get("update_noise", 0.0), noise)
        if offer.secure is None:
            raw = tensorfile.encode(tensors)
        else:
            vector, self.residual = MaskedForm.from_json(offer.secure).vector.encode(tensors, sent, self.residual)
            raw = self.vector = vector.to_bytes()
        at = self.name, offer.job, offer.round, offer.attempt, offer.weights.sha256
        update = UpdateAnnouncement(*at, self.store.put(raw), 10, 5, {"accuracy_after": 0.25})
        if offer.secure is None:
            self.pending = update
            self.resend()
        else:
            self.secure.keep(offer, update, self.air.now)
            self.store.delete(update.weights.sha256)
            self.secure.turn(self.air.now)

    def resend(self) -> None:
        self.announcements.restart(self.air.now)
        self.secure.resend_now(self.air.now)
        self.turn()

    def turn(self) -> None:
        if self.silent:
            return
        self.secure.turn(self.air.now)
        if self.pending is not None and self.announcements.take_if_due(self.air.now):
            self.say(self.pending)


class SecureFleet(Fleet):
    """A fleet whose server has a real worker; `said` is all that boards sent to it."""

    def __init__(self, folder: Path, model: Model, names: tuple[str, ...], **settings: Any) -> None:
        job = Job.from_dict(
            {"name": "t", "rounds": 2, "devices": len(names), "density": 1.0, "deadline_s": 50.0, **settings}
        )
        super().__init__(folder, job, ())
        self.model = model
        self.published: list[tuple[str, bytes]] = []
        for name in names:
            self.air.devices[name] = MaskingBoard(name, folder / "devices", self.air)
        to_server = self.air.to_server

        def record_message(topic: str, payload: bytes) -> None:
            self.published.append((topic, payload))
            to_server(topic, payload)

        self.air.to_server = record_message  # type: ignore[method-assign]

    def board(self, name: str) -> MaskingBoard:
        device = self.air.devices[name]
        if not isinstance(device, MaskingBoard):
            raise TypeError(name)
        return device

    def daemon(self, **options: Any) -> Server:
        worker = Worker(self.job, self.model, BlobStore(self.folder / "blobs", durable=False))
        state = self.storage.load()
        if state is None:
            state = State(model=worker.put_initial_model())
            self.storage.save(state, (), 0.0)
        job = RunnableJob(self.job, self.model.architecture, state, self.storage, self.store, worker)
        return server_of([(job, options)], self.air, self.clock or (lambda: self.air.now))

    def transcript(self) -> Transcript:
        """The last sum's messages, as the server saw them."""
        transcript = Transcript()
        steps = {"keys": "advertise", "shares": "share", "unmasking": "unmask"}
        asked = {"session": "advertise", "roster": "share", "delivery": "mask", "survivors": "unmask"}
        for topic, payload in self.published:
            message = None if topic.endswith("blob") else parse_message(payload)
            if isinstance(message, SecureStep):
                content = message.content[32:] if message.step == "keys" else message.content
                transcript.answers[steps[message.step]][topic.split("/")[3]] = content
        for name in self.air.devices:
            for heard in self.board(name).heard:
                if isinstance(heard, SecureStep):
                    content = heard.content
                    if heard.step == "roster":
                        content = content[2 + 32 * int.from_bytes(content[:2], "big") :]
                    transcript.requests[asked[heard.step]][name] = content
        for topic, payload in self.published:
            message = None if topic.endswith("blob") else parse_message(payload)
            if isinstance(message, UpdateAnnouncement):
                transcript.answers["mask"][message.device] = self.board(message.device).store.read(
                    message.weights.sha256
                )
        return transcript

    def of(self, kind: type[TrainingDone] | type[SecureStep] | type[UpdateAnnouncement] | type[Offer]) -> list[Any]:
        """Messages of a kind that boards sent."""
        parsed = [parse_message(payload) for topic, payload in self.published if not topic.endswith("blob")]
        return [message for message in parsed if isinstance(message, kind)]

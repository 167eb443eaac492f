"""A daemon that runs a job and a rollout at once: what boards are sent, may pull, and report."""

import time
from pathlib import Path

import pytest

from fedprune.blobs.blob_ref import BlobRef
from fedprune.coordination import Phase
from fedprune.releases.release import FILES, Release, read_release
from fedprune.releases.rollout import Rollout, RolloutPhase
from fedprune.releases.rollout_plan import RolloutPlan, Stage
from fedprune.wire.chunk import Chunk
from fedprune.wire.fleet_messages import COMMITTED, DOWNLOADING, ROLLED_BACK, ReleaseOffer, ReleaseReport
from fedprune.wire.messages import BlobNotFound, BlobRequest, parse_message
from fedprune.wire.transfer import Pull
from fedprune_server.ota.store import RolloutStore
from support.fakes.fleet import Air, Fleet, ToyDevice
from support.fakes.runtime_releases import KEY, make_release
from support.fakes.several_jobs import JobsDevice, SeveralJobs, rename_job
from support.fakes.tiny_job import JOB, NAMES


class Updated(ToyDevice):
    """A device that trains, and pulls what it is to install."""

    def __init__(self, name: str, folder: Path, air: Air) -> None:
        super().__init__(name, folder, air)
        self.files: dict[str, Pull] = {}
        self.end = COMMITTED
        self.number = 0
        self.told: ReleaseReport | None = None

    def send_birth(self) -> None:
        super().send_birth()
        if self.told is not None:
            self.say(self.told)

    def hear(self, topic: str, payload: bytes) -> None:
        channel = self.topics.parse(topic).channel
        if channel == "down/blob" and (chunk := Chunk.parse(payload)).sha256 in self.files:
            for want in self.files[chunk.sha256].on_chunk(chunk, self.air.now):
                self.say(want)
            self.install()
        elif channel == "down" and isinstance(offer := parse_message(payload), ReleaseOffer):
            self.pull(offer)
        else:
            super().hear(topic, payload)

    def pull(self, offer: ReleaseOffer) -> None:
        self.number = offer.number
        files = Release.from_bytes(offer.manifest.encode()).files
        refs = [BlobRef(f.sha256, f.size, leaves) for f, leaves in zip(files, offer.leaves, strict=True)]
        self.say(ReleaseReport(self.name, self.number, DOWNLOADING, "", 0, len(refs)))
        self.files = {r.sha256: Pull(r, self.store.partial(r)) for r in refs}
        for pull in self.files.values():
            for want in pull.start(self.air.now):
                self.say(want)
        self.install()

    def install(self) -> None:
        if self.files and all(p.is_done for p in self.files.values()):
            self.told = ReleaseReport(self.name, self.number, self.end, "a reason", 0, 0)
            self.say(self.told)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_release(tmp_path_factory.mktemp("release") / "7", 7)


class UpdatedFleet(Fleet):
    """A fleet with a rollout under way."""

    def __init__(self, folder: Path, release: Path, *stages: Stage) -> None:
        super().__init__(folder)
        self.updated = {n: Updated(n, folder / "updated", self.air) for n in NAMES}
        self.air.devices.update(self.updated)
        contents, manifest, signature = read_release(release, KEY.verifying_key)
        with RolloutStore(folder) as store:
            leaves = tuple(store.blobs.put((release / FILES / f.sha256).read_bytes()).leaves for f in contents.files)
            offer = ReleaseOffer(7, manifest.decode(), signature.hex(), leaves, 3, 600.0)
            store.begin(offer, Rollout.for_boards(RolloutPlan("7", stages), NAMES), 0.0, joins=True)
        self.files = [f.sha256 for f in contents.files]

    def until_over(self, folder: Path, **options: object) -> Rollout:
        """Run a daemon until both job and rollout are over."""
        with RolloutStore(folder) as store, RolloutStore(folder) as reader:
            daemon = self.daemon(rollouts=store, **options)

            def rollout() -> Rollout:
                entry = reader.latest_entry()
                assert entry is not None
                return entry.rollout

            def idle() -> None:
                if daemon.is_busy:
                    time.sleep(0.0005)
                    return
                self.air.now += 0.5
                assert self.air.now < 10_000
                if daemon.is_finished and rollout().phase is not RolloutPhase.RUNNING:
                    daemon.stop()

            self.air.on_idle = idle
            daemon.run()
            return rollout()


def test_a_job_and_a_rollout_go_on_side_by_side(tmp_path: Path, release: Path) -> None:
    calm = Fleet(tmp_path / "calm").run()
    fleet = UpdatedFleet(tmp_path, release, Stage(0.3), Stage(1.0))
    rollout = fleet.until_over(tmp_path)
    assert (rollout.phase, rollout.failures()) == (RolloutPhase.DONE, {})
    for device in fleet.updated.values():
        for name in fleet.files:
            assert device.store.read(name)
    state = fleet.storage.load()
    assert state is not None
    assert state.model == calm.model, "the job comes to the same bits"


def test_nobody_pulls_what_it_is_not_given(tmp_path: Path, release: Path) -> None:
    fleet = UpdatedFleet(tmp_path, release, Stage(1e-9), Stage(1.0))
    for device in fleet.updated.values():
        device.end = ROLLED_BACK
    fleet.air.now = 1.0
    (first,) = fleet.until_over(tmp_path).failures()
    assert all(d.told is None for n, d in fleet.updated.items() if n != first)
    fleet.restart()
    for device in fleet.updated.values():
        device.heard.clear()
        fleet.air.to_server(device.topics.up(device.name), BlobRequest(fleet.files[0], "data", 0, 1).to_bytes())
    fleet.until_over(tmp_path)
    assert all(BlobNotFound(fleet.files[0]) in d.heard for d in fleet.updated.values())


class Busy(Updated, JobsDevice):
    """A device that works for several jobs, and pulls what it is to install."""


def test_several_jobs_and_a_rollout_go_on_side_by_side(tmp_path: Path, release: Path) -> None:
    UpdatedFleet(tmp_path, release, Stage(0.3), Stage(1.0))
    several = SeveralJobs(tmp_path / "jobs", [rename_job(JOB, n, devices=1) for n in ("one", "two")], "")
    several.air.devices.update({n: Busy(n, tmp_path / "busy", several.air) for n in NAMES})
    with RolloutStore(tmp_path) as store:
        states = several.run(several.host(rollouts=store))
        entry = store.latest_entry()
    assert entry is not None
    assert (entry.rollout.phase, entry.rollout.failures()) == (RolloutPhase.DONE, {})
    assert all(state.phase is Phase.FINISHED for state in states.values())
    assert several.clashes == []

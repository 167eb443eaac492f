"""Several jobs on one fleet: each comes to its end, alone with its devices, over crashes at every point."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedprune.coordination import Phase
from fedprune.coordination.commands import Finish
from fedprune.core.errors import ConfigError
from fedprune.wire.messages import Cancelled, Finished, Offer, UpdateAnnouncement
from fedprune.wire.queues import ConnectionDown, ConnectionUp
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.engine.further_jobs import further_configs
from fedprune_server.engine.server import Server
from fedprune_server.observation.snapshot import JobSnapshot
from fedprune_server.storage.storage import Storage
from support.fakes.fleet import Fleet, Watcher, counted_devices, fill
from support.fakes.several_jobs import KilledError, SeveralJobs, rename_job
from support.fakes.tiny_job import JOB


def test_two_jobs_that_need_all_devices_take_turns_and_end_as_if_alone(tmp_path: Path) -> None:
    jobs = [rename_job(JOB, "one"), rename_job(JOB, "two", seed=5, rounds=2)]
    several = SeveralJobs(tmp_path / "several", jobs, "abc")
    states = several.run()
    assert [counted_devices(s) for s in states.values()] == [[["a", "b", "c"]] * 3, [["a", "b", "c"]] * 2]
    for job in jobs:
        assert Fleet(tmp_path / f"alone-{job.name}", job).run().model == states[job.name].model
    assert several.clashes == []


@pytest.mark.parametrize("point", ["before saving", "after saving", "after sending"])
@pytest.mark.parametrize("count", [2, 9, 23])
@pytest.mark.at_push(3)
def test_a_host_killed_anywhere_goes_on_to_the_same_models(tmp_path: Path, point: str, count: int) -> None:
    jobs = [rename_job(JOB, "one", rounds=2), rename_job(JOB, "two", seed=5, rounds=2)]
    expected = {j.name: Fleet(tmp_path / j.name, j).run().model for j in jobs}
    several = SeveralJobs(tmp_path / "several", jobs, "abc")
    host = several.host()
    several.die(point, count)
    with pytest.raises(KilledError):
        several.run(host)
    several.restart()
    assert {n: s.model for n, s in several.run().items()} == expected
    assert several.clashes == []


def test_small_jobs_run_side_by_side_each_with_its_share_and_no_device_stands_idle(tmp_path: Path) -> None:
    jobs = [rename_job(JOB, "one", devices=1, rounds=10), rename_job(JOB, "two", devices=1, rounds=10)]
    several = SeveralJobs(tmp_path, jobs, "abcdef")
    states = several.run()
    for state in states.values():
        assert len(state.history) == 10
        assert max(map(len, counted_devices(state)[:-1])) <= 3  # its share, until the other one is done
    # Which devices a job gets depends on when the worker threads end: a job doesn't wait for one that is at work.
    assert {n for s in states.values() for names in counted_devices(s)[:2] for n in names} == set("abcdef")
    assert several.clashes == []


def stop_at_end(host: Server, job: str, snapshot: JobSnapshot, event: object) -> None:
    if snapshot.name == job and isinstance(event, Finish):
        host.stop()


def test_a_paused_job_gets_no_device_and_holds_nobody_up(tmp_path: Path) -> None:
    several = SeveralJobs(tmp_path, [rename_job(JOB, "one"), rename_job(JOB, "two")], "abc", {"two": 0.0})
    host = several.host(observers=[Watcher(lambda snapshot, event: stop_at_end(host, "one", snapshot, event))])
    states = several.run(host)
    assert [s.phase for s in states.values()] == [Phase.FINISHED, Phase.WAITING]
    assert states["two"].round == 0
    several.restart()
    several.weights = {}
    assert counted_devices(several.run()["two"]) == [["a", "b", "c"]] * 3


def test_devices_hear_of_the_end_when_all_jobs_are_done(tmp_path: Path) -> None:
    several = SeveralJobs(tmp_path, [rename_job(JOB, "one"), rename_job(JOB, "two", rounds=1)], "abc")
    several.run()
    for device in several.air.devices.values():
        ends = [i for i, m in enumerate(device.heard) if isinstance(m, Finished)]
        assert [m.job for m in device.heard if isinstance(m, Finished)] == ["one", "two"]
        assert ends == [len(device.heard) - 2, len(device.heard) - 1]


def test_an_asynchronous_job_shares_with_one_in_rounds(tmp_path: Path) -> None:
    schedule = {"kind": "asynchronous", "arrivals": 2}
    stream = rename_job(
        JOB, "stream", strategy="support.fakes.tiny_job:scheduled", options={"schedule": schedule}, rounds=4
    )
    several = SeveralJobs(tmp_path, [stream, rename_job(JOB, "rounds")], "abcd")
    states = several.run()
    assert [s.phase for s in states.values()] == [Phase.FINISHED] * 2
    assert all(len(names) >= 3 for names in counted_devices(states["rounds"]))
    assert several.clashes == []


def test_a_device_that_connects_anew_at_work_goes_on_with_what_it_owes(tmp_path: Path) -> None:
    several = SeveralJobs(tmp_path, [rename_job(JOB, "one"), rename_job(JOB, "two")], "abc")
    device = several.air.devices["a"]
    take, died = device.take, list[Offer]()

    def dying(offer: Offer) -> None:
        if died:
            take(offer)
            return
        died.append(offer)
        device.die()
        device.session += 1
        device.send_birth()

    device.take = dying  # type: ignore[method-assign]
    assert all(counted_devices(s) == [["a", "b", "c"]] * 3 for s in several.run().values())
    assert several.air.now < JOB.deadline_s
    assert several.clashes == []


def test_what_is_of_no_job_of_the_server_is_cancelled(tmp_path: Path) -> None:
    several = SeveralJobs(tmp_path, [rename_job(JOB, "one", rounds=1), rename_job(JOB, "two", rounds=1)], "abc")
    device = several.air.devices["a"]
    device.pending = UpdateAnnouncement("a", "third", 4, 1, "0" * 64, device.store.put(fill("old")), 10, 5)
    several.run()
    cancellations = [m for m in device.heard if isinstance(m, Cancelled)]
    assert cancellations
    assert {(m.job, m.round) for m in cancellations} == {("third", 4)}


def test_a_device_that_no_job_can_plan_for_holds_nobody_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    several = SeveralJobs(tmp_path, [rename_job(JOB, "one"), rename_job(JOB, "two")], "abcd")
    several.air.devices["b"].profile = "unknown-board"
    host = several.host()
    assert all(counted_devices(s) == [["a", "c", "d"]] * 3 for s in several.run(host).values())
    assert "b" in host.connected
    assert "b" not in host.fleet_snapshot().job_of_device
    assert "there is no hardware profile called" in caplog.text


def test_devices_that_do_not_come_back_after_an_outage_are_lent_no_more(tmp_path: Path) -> None:
    several = SeveralJobs(tmp_path, [rename_job(JOB, "one", devices=2), rename_job(JOB, "two", devices=2)], "abc")
    host = several.host()
    for device in several.air.devices.values():
        device.training_s = 30.0  # so that the jobs don't end before anybody can miss a board
    gone = several.air.devices["c"]
    take = gone.take

    def vanish(offer: Offer) -> None:
        take(offer)
        gone.hear = lambda topic, payload: None  # type: ignore[method-assign]
        several.air.inbox.extend([ConnectionDown("an outage"), ConnectionUp()])

    gone.take = vanish  # type: ignore[method-assign]
    assert all(s.phase is Phase.FINISHED for s in several.run(host).values())
    assert "c" not in host.fleet_snapshot().job_of_device
    assert "c" not in host.connected
    assert several.clashes == []


def test_jobs_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names that differ"):
        SeveralJobs(tmp_path, [JOB, JOB], "a").host()


def test_further_jobs_are_found_in_files_and_in_the_folder(tmp_path: Path) -> None:
    first = ServerConfig(state=tmp_path / "state", max_devices=7, keep=5)
    file = tmp_path / "birds.toml"
    file.write_text('[job]\nname = "birds"\nrounds = 4\n[model]\npath = "m.onnx"\n[server]\nweight = 2\n')
    (from_file,) = further_configs(first, [file])
    assert (from_file.job.name, from_file.job.rounds, from_file.weight, from_file.keep) == ("birds", 4, 2, 3)
    assert (from_file.state, from_file.max_devices, from_file.model) == (
        first.state / "jobs" / "birds",
        7,
        str(tmp_path / "m.onnx"),
    )
    from_file.state.mkdir(parents=True)
    (first.state / "jobs" / "nothing").mkdir()
    with Storage.open_in(from_file.state) as storage:
        storage.put_settings({"job": from_file.job.to_dict(), "name": "m", "server": from_file.server_settings()})
    (from_folder,) = further_configs(first, [])
    assert from_folder == replace(from_file, model=None)
    with pytest.raises(ConfigError, match="birds twice"):
        further_configs(first, [file, file])
    file.write_text('[job]\nname = "birds"\n[server]\nport = 1\n')
    with pytest.raises(ConfigError, match="of a further job"):
        further_configs(first, [file])

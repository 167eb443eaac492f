"""A simulation's folder is one run's, one process's at a time, and usable whatever was mistyped before."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core.errors import PlanError, StorageError
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.planning.profile_store import find
from fedprune_export.importing import import_onnx
from fedprune_server.simulation.digits import deal, digits_model
from fedprune_server.simulation.experiment import Experiment
from fedprune_server.simulation.fleet.virtual_device import VirtualDevice
from fedprune_server.simulation.measure import Measure, Moment, Notes, RoundRecorder
from fedprune_server.simulation.results.run_folder import is_run, simulate
from fedprune_server.simulation.runs import differences
from fedprune_server.simulation.simulation import MAX_ATTEMPTS, Simulation
from support.paths import ROOT

NAMES = ("a", "b")
HAND = deal(NAMES, seed=1)
JOB = Job(rounds=3, devices=2, density=0.25, scorer="ordered", recipe=Recipe(max_steps=1))


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    profile = find("raspberry-pi-5")
    devices = tuple(VirtualDevice(n, profile, HAND.devices[n]) for n in NAMES)
    return Experiment("yard", JOB, import_onnx(digits_model(), "digits"), devices, (HAND.x, HAND.y))


class KillError(Exception):
    """Ends a simulation as a kill does."""


def after(rounds: int) -> Callable[[Simulation], None]:
    def progress(simulation: Simulation) -> None:
        if len(simulation.state.history) == rounds:
            raise KillError

    return progress


def test_a_folder_is_one_process_s_at_a_time(experiment: Experiment, tmp_path: Path) -> None:
    """Whoever comes second is told so and has changed nothing; whoever waited takes up what was done meanwhile."""
    alone = simulate(experiment, tmp_path / "alone")
    second = Simulation(experiment, BlobStore(tmp_path / "run" / "run" / "blobs"), folder=tmp_path / "run" / "run")
    tried = []

    def meanwhile(_: Simulation) -> None:
        if not tried:
            tried.append(True)
            with pytest.raises(StorageError, match="another simulation runs"):
                simulate(experiment, tmp_path / "run")
            with pytest.raises(StorageError, match="another simulation runs"):
                second.run()

    first = simulate(experiment, tmp_path / "run", meanwhile)
    assert tried
    assert first.rounds == alone.rounds
    second.run(lambda _: pytest.fail("something was trained again"))
    assert second.record().rounds == alone.rounds


def test_a_finished_run_s_folder_goes_on_to_more_rounds(experiment: Experiment, tmp_path: Path) -> None:
    simulate(experiment, tmp_path / "whole")
    for rounds in (1, JOB.rounds):
        simulate(replace(experiment, job=replace(JOB, rounds=rounds)), tmp_path / "extended")
    for name in ("config.json", "metrics.json", "metrics.parquet", "rounds.parquet"):
        assert (tmp_path / "extended" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(StorageError, match=r"has come to round 3.*job\.rounds \(stored 3, given 2\)"):
        simulate(replace(experiment, job=replace(JOB, rounds=2)), tmp_path / "extended")


def test_settings_that_differ_are_named_as_stored_and_as_given(experiment: Experiment, tmp_path: Path) -> None:
    simulate(experiment, tmp_path)
    first, second = experiment.devices
    linked = replace(first, profile=find("raspberry-pi-4b"))
    job = replace(JOB, rounds=4, recipe=replace(JOB.recipe, lr=0.1))
    with pytest.raises(StorageError, match="other settings") as caught:
        simulate(replace(experiment, job=job, devices=(linked, second)), tmp_path)
    said = str(caught.value)
    for part in (
        "job.recipe.lr (stored 0.05, given 0.1)",
        "job.rounds (stored 3, given 4)",
        "devices.a.profile (stored 'raspberry-pi-5', given 'raspberry-pi-4b')",
    ):
        assert part in said
    assert "momentum" not in said
    assert "devices.b" not in said


def test_what_no_setting_shows_is_said_to_differ_elsewhere(experiment: Experiment, tmp_path: Path) -> None:
    simulate(experiment, tmp_path)
    assert experiment.evaluation is not None
    x, y = experiment.evaluation
    with pytest.raises(StorageError, match="the server's samples or a strategy's own code"):
        simulate(replace(experiment, evaluation=(x, (y + 1) % 10)), tmp_path)


def test_differences_of_any_two_tables() -> None:
    assert differences({"a": 1, "b": {"c": [1]}}, {"a": 1, "b": {"c": [1]}}) == ""
    assert differences({"a": 1, "b": {}}, {"b": {"c": 2}}) == (
        "a (stored 1, given nothing), b.c (stored nothing, given 2)"
    )
    assert differences({"a": 1}, {"a": 2}, ignored="a") == ""
    many = {str(i): i for i in range(9)}
    assert differences(many, {}).endswith(" and 4 more")


@pytest.mark.parametrize("name", ["simulation.json", "rounds.jsonl"])
def test_the_advice_for_a_damaged_state_leads_to_a_run(experiment: Experiment, tmp_path: Path, name: str) -> None:
    whole = simulate(experiment, tmp_path)
    (tmp_path / "run" / name).write_bytes(b"{")
    with pytest.raises(StorageError, match=f"delete {tmp_path / 'run'} and give the command again"):
        simulate(experiment, tmp_path)
    shutil.rmtree(tmp_path / "run")
    assert is_run(tmp_path)  # so that the command line takes it
    assert simulate(experiment, tmp_path).rounds == whole.rounds


def test_a_run_that_failed_goes_on_from_what_was_saved(experiment: Experiment, tmp_path: Path) -> None:
    """With the same object, whatever it had in memory."""
    simulation = Simulation(experiment, BlobStore(tmp_path / "blobs"), folder=tmp_path)
    with pytest.raises(KillError):
        simulation.run(after(1))
    simulation.run()
    assert simulation.record().rounds == simulate(experiment).rounds


def test_a_record_says_what_the_strategy_gave(experiment: Experiment, tmp_path: Path) -> None:
    job = Job(rounds=1, devices=2, strategy="heterofl", options={"densities": [1.0, 0.25]}, recipe=JOB.recipe)
    record = simulate(replace(experiment, job=job), tmp_path / "run")
    assert [d.density for d in record.devices] == [1.0, 0.25]


def test_a_run_does_not_go_on_with_other_code(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "gentle.py"
    text = (ROOT / "examples" / "my_strategy.py").read_text()
    source.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = replace(experiment, job=Job(rounds=3, devices=2, density=0.25, strategy="gentle:energy", recipe=JOB.recipe))
    with pytest.raises(KillError):
        simulate(own, tmp_path / "run", after(1))
    source.write_text(text.replace("lr_decay: float = 0.98", "lr_decay: float = 0.5"))
    with pytest.raises(StorageError, match="other settings"):
        simulate(replace(own), tmp_path / "run")
    source.write_text(text)
    simulate(replace(own), tmp_path / "run")
    monkeypatch.setattr("fedprune_server.simulation.experiment.__version__", "99")
    with pytest.raises(StorageError, match="other settings"):
        simulate(replace(own), tmp_path / "run")


@pytest.mark.parametrize("change", [{"densities": (0.25,)}, {"every": 2}, None])
def test_what_is_measured_belongs_to_a_run(
    experiment: Experiment, tmp_path: Path, change: dict[str, object] | None
) -> None:
    first = replace(experiment, measure=Measure(HAND.x, HAND.y))
    with pytest.raises(KillError):
        simulate(first, tmp_path, after(1))
    other = None if change is None else Measure(HAND.x, HAND.y, **change)  # type: ignore[arg-type]
    with pytest.raises(StorageError, match="other settings"):
        simulate(replace(first, measure=other), tmp_path)
    assert all(row.measured for row in simulate(first, tmp_path).rounds)


def test_a_measurement_that_is_not_finite_is_left_out(experiment: Experiment, tmp_path: Path) -> None:
    def wild(moment: Moment) -> dict[str, float]:
        return {"nan": float("nan"), "far": -np.inf, "round": moment.round}

    record = simulate(replace(experiment, measure=wild), tmp_path)
    assert [row.measured for row in record.rounds] == [{"round": 1.0}, {"round": 2.0}, {"round": 3.0}]


def test_updates_that_were_left_out_are_not_noted(experiment: Experiment, tmp_path: Path) -> None:
    """Nor is a round without any update left unmeasured."""
    store, closes = BlobStore(tmp_path), list[do.Close]()
    seen: list[tuple[int, str]] = []
    simulation = Simulation(experiment, store)
    execute = simulation._worker.execute

    def watched(command: do.Command) -> on.Event:
        if isinstance(command, do.Close) and not closes:
            closes.append(command)
            note(command)
        return execute(command)  # type: ignore[arg-type]

    def note(command: do.Close) -> None:
        def measure(moment: Moment) -> dict[str, float]:
            seen.append((len(moment.parts), moment.basis.ranking))
            return {}

        notary = RoundRecorder(JOB, experiment.model, store, measure)
        basis = command.contributions[0].basis
        for rejected in ((), ("a",), NAMES):
            notes = Notes()
            notary.close(notes, command, on.Closed(1, basis.model, {}, dict.fromkeys(rejected, "far")), basis, 1.0, 0.0)
            assert notes.updates == 2 - len(rejected)
            assert max((max(g) for g in notes.coverage), default=0) == notes.updates

    simulation._worker.execute = watched  # type: ignore[method-assign]
    simulation.run()
    ranking = closes[0].contributions[0].basis.ranking
    assert seen == [(2, ranking), (1, ranking), (0, ranking)]


def test_coverage_counts_the_channels_that_were_sent(experiment: Experiment, tmp_path: Path) -> None:
    """An extractor may cut more than a device's part says."""
    store, found = BlobStore(tmp_path), list[Notes]()
    simulation = Simulation(experiment, store)
    execute = simulation._worker.execute

    def watched(command: do.Command) -> on.Event:
        if isinstance(command, do.Close) and not found:
            one, other = command.contributions
            narrow = tuple(max(1, w // 2) for w in one.part.widths)
            close = replace(command, contributions=(replace(one, widths=narrow), other))
            found.append(Notes())
            event = on.Closed(1, one.basis.model)
            RoundRecorder(JOB, experiment.model, store, None).close(found[0], close, event, one.basis, 1.0, 0.0)
            expected = [n + w for n, w in zip(narrow, other.part.widths, strict=True)]
            assert [sum(g) for g in found[0].coverage] == expected
        return execute(command)  # type: ignore[arg-type]

    simulation._worker.execute = watched  # type: ignore[method-assign]
    simulation.run()
    assert found


def slow_fleet(experiment: Experiment, windows: bool) -> Experiment:
    """Every second device misses its deadline again and again, while a window is open for long."""
    slow, quick = find("raspberry-pi-zero-2w"), find("raspberry-pi-5")
    hand = deal(["a", "b", "c", "d"], seed=1)
    devices = tuple(
        VirtualDevice(n, slow if i % 2 or not windows else quick, hand.devices[n]) for i, n in enumerate(hand.devices)
    )
    recipe, options = Recipe(max_steps=4), {"window_s": 20.0}
    job = Job(rounds=2, devices=2, strategy="fedfix", options=options, deadline_s=0.3, recipe=recipe)
    return replace(experiment, job=job, devices=devices)


def test_slow_devices_do_not_end_an_asynchronous_simulation(experiment: Experiment) -> None:
    record = simulate(slow_fleet(experiment, windows=True))
    assert [set(r.local) for r in record.rounds] == [{"a", "c"}] * 2


def test_an_asynchronous_simulation_that_nobody_can_finish_ends(experiment: Experiment) -> None:
    with pytest.raises(PlanError, match=f"no device finished round 1 in {MAX_ATTEMPTS} attempts"):
        simulate(slow_fleet(experiment, windows=False))

"""`fedprune-server` in this process: errors end with their codes, results can be looked at and taken out."""

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import Phase, State, make_coordinator
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core import tensorfile
from fedprune.core.errors import ExitCode
from fedprune.jobs.job import Job
from fedprune.runtime.session import OnnxSession
from fedprune.strategies.channel_ranking import group_keys
from fedprune.strategies.methods.fedprune import RANKS
from fedprune_export import load
from fedprune_server.cli.main import main
from fedprune_server.config.server_config import ServerConfig
from fedprune_server.engine.state_folder import StateFolder
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.messaging.second_server import OtherServerError, SecondServerGuard
from fedprune_server.simulation.digits import digits_model
from fedprune_server.storage.storage import Storage
from support.fakes.opened_job import open_job

NARROW = Job(strategy="fedprune", options={"dropout": [0.5]})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name)
        for name, shape in (("w1", (6, 4)), ("b1", (6,)), ("w2", (3, 6)), ("b2", (3,)))
    ]
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], transB=1),
            helper.make_node("Relu", ["h"], ["a"]),
            helper.make_node("Gemm", ["a", "w2", "b2"], ["logits"], transB=1),
        ],
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])],
        weights,
    )
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def state(model: Path, tmp_path: Path) -> Path:
    """A state folder with a job that has begun and moved its weights."""
    with StateFolder(tmp_path / "state") as folder:
        opened = open_job(folder, ServerConfig(job=Job(name="leaves", rounds=5), model=str(model)))
        changed_tensors = {n: v + 1 for n, v in opened.model.tensors.items()}
        opened.state.model = folder.store.put(tensorfile.encode(changed_tensors)).sha256
        opened.state.round = 1
        opened.state.history.append(
            {
                "round": 1,
                "at": 1.0,
                "model": opened.state.model,
                "metrics": {"accuracy": 0.5},
                "devices": {"pi": {"progress": "refused", "reason": "no room"}},
            }
        )
        folder.storage.save(opened.state, [on.Ticked()], 1.0)
    return tmp_path / "state"


@pytest.fixture
def closed_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        yield listener.getsockname()[1]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error, which must be one line."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--model", "{model}", "--broker", "mqtt://127.0.0.1:{port}"], ExitCode.BROKER, "127.0.0.1:{port}"),
        (["--model", "{folder}/wrong.onnx"], ExitCode.MODEL, "wrong.onnx"),
        ([], ExitCode.CONFIG, "--model"),
        (["--devices", "x"], ExitCode.CONFIG, "--devices: job.devices: expected a whole number from 1 to"),
        (["--model", "{model}", "--evaluation", "{folder}/e.npz"], ExitCode.DATA, "e.npz"),
    ],
    ids=["broker", "model", "no model", "devices", "evaluation"],
)
def test_a_start_that_fails_ends_with_one_clear_error(
    model: Path, tmp_path: Path, closed_port: int, options: list[str], code: ExitCode, words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "wrong.onnx").write_bytes(b"not onnx")
    np.savez(tmp_path / "e.npz", x=np.zeros((4, 9), np.float32), y=np.zeros(4, np.int64))
    placeholders = {"model": model, "folder": tmp_path, "port": closed_port}
    filled = [option.format(**placeholders) for option in options]
    assert main(["run", "--insecure", "--state", str(tmp_path / "s"), *filled]) == code
    assert words.format(**placeholders) in one_line(capsys)


def test_another_model_is_refused_by_a_folder_that_has_one(
    state: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other_model = onnx.load(model)
    other_model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.zeros((6, 4), np.float32), "w1"))
    onnx.save(other_model, tmp_path / "other.onnx")
    assert (
        main(["run", "--insecure", "--model", str(tmp_path / "other.onnx"), "--state", str(state)]) == ExitCode.CONFIG
    )
    assert "is not the model with which the job" in one_line(capsys)


def test_a_start_that_failed_is_not_remembered(state: Path, closed_port: int) -> None:
    def stored_settings() -> object:
        with StateFolder(state) as folder:
            return folder.storage.settings()

    before = stored_settings()
    command = ["run", "--insecure", "--state", str(state), "--broker", f"mqtt://127.0.0.1:{closed_port}"]
    assert main([*command, "--rounds", "9"]) == ExitCode.BROKER
    assert stored_settings() == before


@pytest.mark.parametrize(("option", "value"), [("--name", "trees"), ("--model", "nets:make")])
def test_another_job_is_refused_by_a_folder_that_has_one(
    state: Path, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--insecure", "--state", str(state), option, value]) == ExitCode.CONFIG
    line = one_line(capsys)
    assert value in line
    assert f"{state} " in line
    assert "job leaves of model model" in line


def test_a_server_that_is_still_starting_ends_at_sigterm_as_one_that_runs(
    state: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(
        "fedprune_server.cli.main.importlib.import_module", lambda _: os.kill(os.getpid(), signal.SIGTERM)
    )
    with pytest.raises(SystemExit) as ended:
        main(["run", "--insecure", "--state", str(state)])
    assert (ended.value.code, signal.getsignal(signal.SIGTERM)) == (ExitCode.OK, before)
    assert "stopped by SIGTERM" in capfd.readouterr().err


def test_a_copy_that_is_refused_has_reached_nobody(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    IdentityFolder.make(state, "default").close()

    def refuse(*_: object, **__: object) -> None:
        raise OtherServerError("another server runs this fleet")

    monkeypatch.setattr(SecondServerGuard, "enter", refuse)
    (tmp_path / "fleet.toml").write_text(
        f"[job]\nname = 'leaves'\nrounds = 77\n[server]\non_revocation = 'touch {tmp_path / 'delivered'}'\n"
    )
    command = ["run", "--state", str(state), "--port", "0", "--config", str(tmp_path / "fleet.toml")]
    assert main(command) == ExitCode.OTHER_SERVER
    assert "rounds" not in capsys.readouterr().out, "a start that is refused changes no setting"
    assert not (tmp_path / "delivered").exists()
    assert not (state / "alerts.json").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("[alerts]\nwebhook = 'https://a.example'\nwebhook_secret = 'empty'\n", "a text of 1 to"),
        (
            "[server]\nconsole = '8470'\nconsole_certificate = 'empty'\nconsole_key = 'empty'\n",
            "a certificate and its key",
        ),
        ("[server]\nconsole = '192.0.2.1:8470'\nconsole_insecure = true\n", "can't listen on 192.0.2.1"),
    ],
)
def test_settings_are_wrong_before_the_server_enters_its_site(
    state: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: str,
    says: str,
) -> None:
    IdentityFolder.make(state, "default").close()
    (tmp_path / "empty").touch()
    (tmp_path / "fleet.toml").write_text(f"{settings}[job]\nname = 'leaves'\n")
    entered: list[str] = []
    monkeypatch.setattr(SecondServerGuard, "enter", lambda *_: entered.append("now"))
    command = ["run", "--state", str(state), "--port", "0", "--config", str(tmp_path / "fleet.toml")]
    assert main(command) == ExitCode.CONFIG
    assert says in one_line(capsys)
    assert not entered


def test_a_damaged_model_file_in_the_folder_is_noticed(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (state / "model.onnx").write_bytes(b"x")
    assert main(["run", "--insecure", "--state", str(state)]) == ExitCode.STORAGE
    assert "model.onnx is damaged" in one_line(capsys)


def test_all_blobs_of_an_offer_are_there_after_a_second_start(model: Path, tmp_path: Path) -> None:
    config = ServerConfig(job=Job(name="leaves"), model=str(model))
    with StateFolder(tmp_path / "s") as folder:
        open_job(folder, config)
        opened = open_job(folder, config)
        scored = opened.worker.execute(do.Score(1, opened.state.model, {}, ("a",)))
        assert isinstance(scored, on.Scored)
        basis = do.Basis(1, opened.state.model, scored.ranking)
        extracted = opened.worker.execute(do.Extract(basis, do.DevicePart("a", 1, (4,), 1.0, 50, None)))
        assert isinstance(extracted, on.Extracted)
        for name in ("weights", "training", "inference"):
            assert folder.store.has(extracted.offer[name]["sha256"])


def test_more_rounds_wake_a_finished_job(state: Path) -> None:
    with StateFolder(state) as folder:
        stored_state = folder.storage.load()
        assert stored_state is not None
        stored_state.phase = Phase.FINISHED
        folder.storage.save(stored_state, (), 2.0)
        opened = open_job(folder, ServerConfig(job=Job(name="leaves", rounds=9)))
    make_coordinator(opened.job, opened.model.architecture, opened.state).handle(on.Resumed(), 3.0)
    assert opened.state.phase is Phase.WAITING
    assert opened.setting_changes == ["rounds: 5 is now 9"]


def test_the_exported_model_computes_with_the_current_weights(
    state: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.onnx"
    assert main(["export-model", "--state", str(state), "--out", str(out)]) == ExitCode.OK
    x = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    w = {t.name: numpy_helper.to_array(t) + 1 for t in onnx.load(model).graph.initializer}
    expected = np.maximum(x @ w["w1"].T + w["b1"], 0) @ w["w2"].T + w["b2"]
    np.testing.assert_allclose(OnnxSession(out).run({"x": x})["logits"], expected, rtol=1e-5, atol=1e-5)
    capsys.readouterr()
    assert main(["export-model", "--state", str(state), "--out", str(out), "--json"]) == ExitCode.OK
    body = json.loads(capsys.readouterr().out)
    assert (body["file"], body["bytes"]) == (str(out), out.stat().st_size)
    assert 0 <= body["difference"] < 1e-5
    assert body["round"] == 1


def test_a_model_is_exported_in_the_layout_of_the_hub(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "for-the-hub"
    assert main(["export-model", "--state", str(state), "--out", str(out), "--json"]) == ExitCode.OK
    body = json.loads(capsys.readouterr().out)
    assert (body["file"], body["bytes"]) == (str(out), sum(path.stat().st_size for path in out.iterdir()))
    with StateFolder(state) as folder:
        exported = tensorfile.encode(load(out).tensors)
        assert tensorfile.sha256_hex(exported) == folder.storage.load().model  # type: ignore[union-attr]
    card = (out / "README.md").read_text()
    assert (
        '"dataset": {"type": "own-data", "name": "own data"}, "metrics": [{"type": "accuracy", "value": 0.5}]' in card
    )
    assert " 50.0% |" in card
    assert "| pi |" not in card
    assert main(["export-model", "--state", str(state), "--out", str(out), "--opset", "13"]) == ExitCode.USAGE


def test_a_model_is_exported_while_its_server_begins_another_round(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with StateFolder(tmp_path / "state") as folder:
        opened = open_job(folder, ServerConfig(job=NARROW, model=str(model)))
        opened.state.round = 1
        folder.storage.save(opened.state, [on.Ticked()], 1.0)
    load_state, collected = Storage.load, ["7" * 64]

    def late(storage: Storage) -> State | None:
        """The state of a moment ago."""
        state = load_state(storage)
        if state is not None and collected:
            state.memory = {RANKS: collected.pop()}
        return state

    monkeypatch.setattr(Storage, "load", late)
    command = ["export-model", "--state", str(tmp_path / "state"), "--out", str(tmp_path / "m.onnx")]
    assert (main(command), collected) == (ExitCode.OK, [])
    collected.extend(["7" * 64] * 9)  # it is missing
    assert main(command) == ExitCode.STORAGE
    assert "7" * 64 in capsys.readouterr().err


def test_the_model_after_an_earlier_round_has_that_rounds_ranks(model: Path, tmp_path: Path) -> None:
    out, memories = tmp_path / "m.onnx", list[str]()
    command = ["export-model", "--state", str(tmp_path / "state"), "--out", str(out)]
    with StateFolder(tmp_path / "state") as folder:
        opened = open_job(folder, ServerConfig(job=NARROW, model=str(model)))
        state, architecture = opened.state, opened.model.architecture
        orders = [[np.roll(np.arange(size), n) for size in architecture.sizes] for n in (1, 2)]
        for n, order in enumerate(orders, 1):
            weights = {name: value + np.float32(n) for name, value in opened.model.tensors.items()}
            ranks = tensorfile.encode(dict(zip(group_keys(architecture), order, strict=True)))
            state.model = folder.store.put(tensorfile.encode(weights)).sha256
            state.memory = {RANKS: folder.store.put(ranks).sha256}
            state.round, memories = n, [*memories, state.memory[RANKS]]
            state.history.append({"round": n, "at": n, "model": state.model, "metrics": {}, "devices": {}})
            folder.storage.save(state, [on.Closed(n, state.model, state.memory)], float(n))

    for n, order in enumerate(orders, 1):
        assert main([*command, "--round", str(n)]) == ExitCode.OK
        assert list(map(list, load(out).ranks or ())) == list(map(list, order))
    BlobStore(tmp_path / "state" / "blobs").delete(memories[0])
    assert main([*command, "--round", "1"]) == ExitCode.OK
    assert load(out).ranks is None


def test_the_best_model_is_exported_with_its_round_and_score(
    state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "best.safetensors"
    command = ["export-model", "--state", str(state), "--out", str(out)]
    with StateFolder(state) as folder:
        job = folder.storage.load()
        assert job is not None
        best, job.model, job.round = job.model, folder.store.put(b"a later model").sha256, 2
        job.history.append({"round": 2, "at": 2.0, "model": job.model, "metrics": {"accuracy": 0.25}, "devices": {}})
        folder.storage.save(job, [on.Ticked()], 2.0)
    assert main([*command, "--round", "best"]) == ExitCode.OK
    assert tensorfile.sha256_hex(out.read_bytes()) == best
    assert "the best global model after round 1 (accuracy 50.0%)" in capsys.readouterr().out
    assert main([*command, "--round", "best", "--json"]) == ExitCode.OK
    body = json.loads(capsys.readouterr().out)
    assert (body["round"], body["metric"], body["score"]) == (1, "accuracy", 0.5)
    with pytest.raises(SystemExit) as refused:
        main([*command, "--round", "first"])
    assert refused.value.code == ExitCode.USAGE


@pytest.mark.torch
def test_torch_loads_the_exported_weights(state: Path, tmp_path: Path) -> None:
    import torch

    for name in ("w.pt", "w.safetensors"):
        assert main(["export-model", "--state", str(state), "--out", str(tmp_path / name)]) == ExitCode.OK
    exported = torch.load(tmp_path / "w.pt", weights_only=True)
    expected = tensorfile.load_tensors(tmp_path / "w.safetensors")
    assert list(exported) == list(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(exported[name].numpy(), value)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--out", "model.txt"], ExitCode.USAGE), (["--out", "m.onnx", "--round", "9"], ExitCode.STORAGE)],
)
def test_what_can_not_be_exported_is_an_error(state: Path, arguments: list[str], code: ExitCode) -> None:
    assert main(["export-model", "--state", str(state), *arguments]) == code


def test_a_missing_global_model_is_noticed(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StateFolder(state) as folder:
        digest = folder.storage.load().model  # type: ignore[union-attr]
        folder.store.delete(digest)
    assert main(["run", "--insecure", "--state", str(state)]) == ExitCode.STORAGE
    assert digest in one_line(capsys)


def test_a_first_start_that_failed_leaves_room_for_another_model_name_and_broker(
    model: Path, tmp_path: Path, closed_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.onnx").write_bytes(digits_model())
    command = ["run", "--insecure", "--state", str(tmp_path / "s"), "--broker", f"mqtt://127.0.0.1:{closed_port}"]
    assert main([*command, "--model", str(tmp_path / "other.onnx"), "--name", "levaes"]) == ExitCode.BROKER
    assert main([*command, "--model", str(model), "--name", "leaves"]) == ExitCode.BROKER
    with StateFolder(tmp_path / "s") as folder:
        opened = open_job(folder, ServerConfig(job=Job(name="leaves"), model=str(model)))
    assert (opened.state.round, opened.setting_changes) == (0, [])

import errno
import io
import threading

import numpy as np
import pytest
import safetensors.numpy

from fedprune.core import tensorfile
from fedprune.core.errors import DataError
from fedprune_device.client import Board, BoardError
from fedprune_device.data.image_decoding import Pixels
from fedprune_device.data.labels import Targets
from fedprune_device.serving.model_slots import ServingRecord
from support.fakes.local_board import NAMES, LocalBoard, ask, npy, request, softmax, weights_of
from support.fakes.sample_files import image_file
from support.faults.failing_disk import fault
from support.waiting import until

pytestmark = pytest.mark.board

X = np.random.default_rng(1).standard_normal((5, 6)).astype(np.float32)
NPY = "application/x-npy"


# Predictions


def test_a_batch_is_predicted_as_the_model_computes_it(serving_board: LocalBoard) -> None:
    prediction = serving_board.board.predict(X)
    weights = weights_of(1)
    np.testing.assert_allclose(prediction.probabilities, softmax(X @ weights["w"].T + weights["b"]), atol=1e-5)
    assert prediction.classes == np.argmax(prediction.probabilities, 1).tolist()
    assert (prediction.job, prediction.round) == ("job", 1)
    assert prediction.digest == serving_board.slots.current().weights
    assert [p["name"] for p in prediction.predictions] == [NAMES[c] for c in prediction.classes]


def test_what_the_boards_own_labels_say_is_in_the_probabilities(local: LocalBoard) -> None:
    weights = local.install(1, offset=(0.0, 3.0, 0.0), present=(1.0, 1.0, 0.0))
    with local.serving():
        probabilities = local.board.predict(X).probabilities
    logits = X @ weights["w"].T + weights["b"] + [0, 3, 0]
    logits[:, 2] = 0
    np.testing.assert_allclose(probabilities, softmax(logits), atol=1e-5)


JSON = "application/json"


@pytest.mark.parametrize(
    ("kind", "body", "what"),
    [
        (NPY, npy(X[:, :5]), "shape of the input"),
        (NPY, npy(np.array([1.5], object)), "bytes of object [1]"),
        (NPY, npy(np.zeros((65, 6), np.float32)), "number of samples"),
        (NPY, npy(np.full((1, 6), np.nan, np.float32)), "not finite"),
        (NPY, npy(X)[:-1], "bytes of float32 [5, 6]"),
        (NPY, npy(X).replace(b"(5, 6)", b"(5.,6)"), ".npy file"),
        (NPY, npy(X).replace(b"(5, 6)", b"(-5,6)"), "bytes of float32 [-5, 6]"),
        ("application/safetensors", safetensors.numpy.save({"x": X})[:-1], "safetensors file"),
        ("application/octet-stream", X.tobytes()[:-1], "bytes of raw numbers"),
        (JSON, b'{"x": [[1, 2, 3, 4, 5, 6], [1]]}', "x"),
        (JSON, b'{"x": [1e999, 2, 3, 4, 5, 6]}', "not finite"),
    ],
)
def test_an_input_that_does_not_fit_is_said_so(open_board: LocalBoard, kind: str, body: bytes, what: str) -> None:
    status, answer = ask(open_board, request("POST", "/v1/predict", body, Content_Type=kind))
    assert status == 422, answer
    assert what in answer["error"]["what"]


def test_before_the_first_model_the_board_says_so_and_then_finds_it(local: LocalBoard) -> None:
    with local.serving():
        status, answer = ask(local, request("POST", "/v1/predict", npy(X), Content_Type=NPY))
        assert (status, answer["error"]["what"]) == (503, "no model serves yet")
        assert not local.board.healthy()
        local.install(1)
        until(local.board.healthy)
        assert local.board.predict(X).round == 1


def test_every_answer_is_of_one_whole_model_while_models_are_swapped(local: LocalBoard) -> None:
    rounds = range(1, 13)
    expected = {n: softmax(X @ weights_of(n)["w"].T + weights_of(n)["b"]) for n in rounds}
    local.install(1)
    rounds_by_thread: list[list[int]] = [[], [], []]
    errors: list[BaseException] = []
    done = threading.Event()

    def predict(served_rounds: list[int]) -> None:
        try:
            while not done.is_set():
                prediction = local.board.predict(X)
                np.testing.assert_allclose(prediction.probabilities, expected[prediction.round], atol=1e-5)
                served_rounds.append(prediction.round)
        except BaseException as error:  # noqa: BLE001 - handed to the test
            errors.append(error)

    with local.serving():
        threads = [threading.Thread(target=predict, args=(served_rounds,)) for served_rounds in rounds_by_thread]
        for thread in threads:
            thread.start()
        for n in rounds[1:]:
            local.install(n)
            local.model.poll()
            before = sum(map(len, rounds_by_thread))
            # Else all may be over before anybody has asked.
            until(lambda before=before: sum(map(len, rounds_by_thread)) > before or errors)  # type: ignore[misc]
        done.set()
        for thread in threads:
            thread.join()
    assert not errors, errors[0]
    assert all(
        served_rounds == sorted(served_rounds) for served_rounds in rounds_by_thread
    )  # never back to an older model
    assert len({n for served_rounds in rounds_by_thread for n in served_rounds}) > 1


def test_a_model_that_fails_its_check_does_not_answer(local: LocalBoard, caplog: pytest.LogCaptureFixture) -> None:
    local.install(1)
    with local.serving():
        bad = tensorfile.encode({"w": np.full((3, 6), np.inf, np.float32), "b": np.zeros(3, np.float32)})
        local.slots.stage(local.graph, bad)
        graph = tensorfile.sha256_hex(local.graph.read_bytes())
        files = {"inference.onnx": graph, "weights.safetensors": tensorfile.sha256_hex(bad)}
        local.slots.install(ServingRecord("job", 2, 3, files))
        local.model.poll()
        assert local.board.predict(X).round == 1
        assert "not finite" in caplog.text
        local.install(3)
        local.model.poll()
        assert local.board.predict(X).round == 3


# Samples


def test_samples_are_handed_in_counted_labelled_and_taken_back(serving_board: LocalBoard) -> None:
    board = serving_board.board
    one = board.add(X[0], label="bee")
    assert (one["label"], one["name"], one["kept"], one["duplicate"]) == (1, "bee", True, False)
    assert board.add(X[0], label=1)["duplicate"]
    two = board.add(X[1])
    assert (two["label"], two["kept"]) == (None, True)
    assert board.samples()["unlabelled"] == 1
    assert board.label(two["id"], "cat")["label"] == 2
    counts = board.samples()
    assert counts["classes"] == {"1": {"kept": 1, "seen": 1, "name": "bee"}, "2": {"kept": 1, "seen": 1, "name": "cat"}}
    board.delete(one["id"])
    board.delete(one["id"])
    assert sum(board.samples()["parts"].values()) == 1
    with pytest.raises(BoardError, match="there already") as refusal:
        board.add(X[1], 0)
    assert refusal.value.status == 409
    with pytest.raises(BoardError, match="no sample") as refusal:
        board.label("0" * 32, 0)
    assert refusal.value.status == 404


def test_an_image_before_the_first_model_gets_the_shape_that_the_request_states(local: LocalBoard) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3)).astype(np.uint8)
    picture = image_file(pixels)
    with local.serving(pixels=Pixels()):
        x = np.load(io.BytesIO(local.board.sample(local.board.add(picture, "bee", shape=(3, 5, 4))["id"])))
        np.testing.assert_allclose(x, pixels.transpose(2, 0, 1) / 255, atol=1e-6)
        for shape in ((3, 0, 4), (2, 5, 4), (3, 99_999, 99_999)):
            with pytest.raises(BoardError, match="1 or 3 colours") as refusal:
                local.board.add(picture, shape=shape)
            assert refusal.value.status == 422
        with pytest.raises(BoardError, match="image/jpeg") as refusal:
            local.board.add(X[0], shape=(3, 5, 4))
        assert refusal.value.status == 400
        local.samples.snapshot((3, 5, 4), Targets("cross_entropy", 3))
        assert local.board.add(picture, shape=(3, 5, 4))["duplicate"]
        with pytest.raises(BoardError, match=r"\[3, 5, 4\], got \[3, 8, 8\]"):
            local.board.add(picture, shape=(3, 8, 8))


def test_an_image_waits_for_a_person_who_looks_at_it_and_labels_it(local: LocalBoard) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3)).astype(np.uint8)
    with local.serving(pixels=Pixels((0.4, 0.5, 0.6), (0.2,))):
        with pytest.raises(BoardError, match="without a model") as refusal:
            local.board.add(image_file(pixels))
        assert refusal.value.status == 503
        with pytest.raises(DataError):  # an offer that finds no samples
            local.samples.snapshot((3, 5, 4), Targets("cross_entropy", 3))
        assert local.board.status()["input"] == [3, 5, 4]
        name = local.board.add(image_file(pixels))["id"]
        assert local.board.unlabelled_samples() == [name]
        assert (np.asarray(image.open(io.BytesIO(local.board.sample(name, "image/png")))) == pixels).all()
        x = np.load(io.BytesIO(local.board.sample(name)))
        np.testing.assert_allclose(x, (pixels.transpose(2, 0, 1) / 255 - [[[0.4]], [[0.5]], [[0.6]]]) / 0.2, atol=1e-5)
        local.board.label(name, "bee")
        assert local.board.unlabelled_samples() == []
        for sample, status in ((local.board.add(np.ones(6))["id"], 422), ("0" * 32, 404)):
            with pytest.raises(BoardError) as refusal:
                local.board.sample(sample, "image/png")
            assert refusal.value.status == status


def test_samples_are_not_shown_on_a_port(local: LocalBoard) -> None:
    with local.serving("127.0.0.1:0"):
        board = Board(f"127.0.0.1:{local.server.port}", tries=1)
        name = board.add(np.ones(6))["id"]
        for ask_for in (board.unlabelled_samples, lambda: board.sample(name)):
            with pytest.raises(BoardError, match="Unix socket") as refusal:
                ask_for()
            assert refusal.value.status == 403
        board.label(name, 1)


def test_a_board_with_data_of_its_own_takes_no_samples(local: LocalBoard) -> None:
    local.install(1)
    with local.serving(takes=False):
        for raw in (request("GET", "/v1/samples"), request("POST", "/v1/samples", npy(X[0]), Content_Type=NPY)):
            assert ask(local, raw)[0] == 409
        assert local.board.predict(X).round == 1


def test_a_full_disk_is_507_and_the_next_sample_is_taken(serving_board: LocalBoard) -> None:
    with fault(1, OSError(errno.ENOSPC, "No space left on device")):
        status, _ = ask(serving_board, request("POST", "/v1/samples?label=0", npy(X[0]), Content_Type=NPY))
    assert status == 507
    assert serving_board.board.add(X[0], 0)["kept"]


def test_a_picture_that_would_unpack_to_more_than_memory_is_refused() -> None:
    large = pytest.importorskip("PIL.Image").new("1", (14_000, 14_000))
    with pytest.raises(DataError, match="image"):
        Pixels().read(image_file(large), ("PNG",), (3, 4, 4))

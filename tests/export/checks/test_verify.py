"""`verify`: a good bundle passes, and every kind of damage is found, also where the manifest agrees with it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import fedprune_export as fx
from fedprune.core import tensorfile
from fedprune.core.errors import BundleError, ExitCode, FedpruneError, ModelError, TrainingError
from fedprune.model import step_contract
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.runtime.bundle import ARCHITECTURE, FILES, INFERENCE, TRAINING, WEIGHTS, manifest_text
from fedprune.runtime.bundle_folder import write_bundle
from fedprune_export.bundles.bundle import bundle_files
from fedprune_export.bundles.verification import verify_bundle
from fedprune_export.checks.parity import check_parity, try_step
from fedprune_export.cli.main import main
from fedprune_export.importing import import_onnx
from fedprune_export.pruning.model import Model
from fedprune_server.simulation.digits import digits_model
from support.nets.token_net import token_net

Damage = Callable[[dict[str, bytes], Model, Selection], dict[str, bytes]]  # changed files of a bundle

CHECKS = ["files", "weights", "inference", "training", "descent", "agreement"]


@pytest.fixture(scope="module")
def model() -> Model:
    return import_onnx(digits_model(), "digits")


@pytest.fixture(scope="module")
def half(model: Model) -> Selection:
    random = np.random.default_rng(3)
    arch = model.architecture
    return Selection.of(arch, [n // 2 for n in arch.sizes], [random.permutation(n) for n in arch.sizes])


@pytest.fixture(scope="module")
def files(model: Model, half: Selection) -> dict[str, bytes]:
    return bundle_files(model, half, Recipe())


def save_files(folder: Path, files: dict[str, bytes], half: Selection, recipe: Recipe | None = None) -> Path:
    """A bundle whose manifest agrees with its files, whatever is in them."""
    write_bundle(folder, files, half, recipe or Recipe(), "raspberry-pi-5")
    return folder


def passed_checks(folder: Path, model: Model | None = None) -> tuple[list[str], FedpruneError | None]:
    """The checks that were passed, and what ended them."""
    done: list[str] = []
    try:
        for check in verify_bundle(folder, model):
            done.append(check.name)  # noqa: PERF401  what came before the error counts
    except FedpruneError as error:
        return done, error
    return done, None


def test_a_good_bundle_passes(files: dict[str, bytes], half: Selection, model: Model, tmp_path: Path) -> None:
    assert passed_checks(save_files(tmp_path / "b", files, half)) == (CHECKS, None)
    assert passed_checks(tmp_path / "b", model) == ([*CHECKS, "model"], None)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(proximal=0.1, logit_adjustment=True, mask_absent_classes=True, balance_classes=True),
        Recipe(optimizer="lion", clip_norm=1.0, keep_optimizer_state=True),
        Recipe(optimizer="adamw", accumulate=2, frozen=("conv1.*", "bn1.*")),
        Recipe(mixup=0.3, label_smoothing=0.1, accumulate=2),
    ],
    ids=lambda r: r.features.key,
)
def test_every_recipe_can_be_tried(model: Model, half: Selection, recipe: Recipe, tmp_path: Path) -> None:
    assert passed_checks(save_files(tmp_path / "b", bundle_files(model, half, recipe), half, recipe)) == (CHECKS, None)


@pytest.mark.parametrize("name", FILES)
def test_one_changed_bit_is_found(files: dict[str, bytes], half: Selection, tmp_path: Path, name: str) -> None:
    folder = save_files(tmp_path / "b", files, half)
    raw = bytearray((folder / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (folder / name).write_bytes(raw)
    done, error = passed_checks(folder)
    assert done == []
    assert isinstance(error, BundleError)
    assert name in str(error)


def change_model(raw: bytes, change: Callable[[onnx.ModelProto], None]) -> bytes:
    proto = onnx.load_model_from_string(raw)
    change(proto)
    out: bytes = proto.SerializeToString()
    return out


def test_a_recipe_without_a_rate_is_no_reason_to_complain(model: Model, half: Selection, tmp_path: Path) -> None:
    still = Recipe(lr=0.0)
    write_bundle(tmp_path / "b", bundle_files(model, half, still), half, still, "raspberry-pi-5")
    assert [c.name for c in verify_bundle(tmp_path / "b")][-1] == "agreement"


def not_finite(files: dict[str, bytes], model: Model, half: Selection) -> dict[str, bytes]:
    tensors = {n: v.copy() for n, v in tensorfile.decode(files[WEIGHTS]).items()}
    tensors["conv2.weight"].flat[7] = np.nan
    return {WEIGHTS: tensorfile.encode(tensors)}


def of_another_width(files: dict[str, bytes], model: Model, half: Selection) -> dict[str, bytes]:
    return {INFERENCE: bundle_files(model, half.with_widths([w + 1 for w in half.widths]), Recipe())[INFERENCE]}


def edits(name: str) -> Callable[[Callable[[onnx.ModelProto], None]], Damage]:
    """A damage of one graph, by what it does to the file."""
    return lambda change: lambda files, model, half: {name: change_model(files[name], change)}


@edits(TRAINING)
def uphill(proto: onnx.ModelProto) -> None:
    """Weights are moved along the gradient instead of against it."""
    for node in proto.graph.node:
        if node.op_type == "Sub" and node.output[0].endswith("::next"):
            node.op_type = "Add"


@edits(TRAINING)
def still(proto: onnx.ModelProto) -> None:
    for node in proto.graph.node:
        if node.op_type == "Sub" and node.output[0].endswith("::next"):
            del node.input[1:]
            node.op_type = "Identity"


@edits(INFERENCE)
def double_logits(proto: onnx.ModelProto) -> None:
    """Logits are doubled: the graph still loads, runs and is finite."""
    for node in proto.graph.node:
        node.output[:] = ["half" if o == "logits" else o for o in node.output]
    proto.graph.node.append(onnx.helper.make_node("Add", ["half", "half"], ["logits"]))


@edits(INFERENCE)
def crop_logits(proto: onnx.ModelProto) -> None:
    for node in proto.graph.node:
        node.output[:] = ["all" if o == "logits" else o for o in node.output]
    for name, number in (("from", 0), ("to", 9), ("axis", 1)):
        proto.graph.initializer.append(numpy_helper.from_array(np.array([number]), name))
    proto.graph.node.append(onnx.helper.make_node("Slice", ["all", "from", "to", "axis"], ["logits"]))
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 9


@pytest.mark.parametrize(
    ("damage", "before", "kind", "message"),
    [
        (not_finite, 1, BundleError, "conv2.weight has numbers that are not finite"),
        (of_another_width, 2, BundleError, ""),
        (crop_logits, 2, ModelError, "expected (1, 10), got (1, 9)"),
        (still, 3, TrainingError, "a step moves no weight"),
        (uphill, 4, TrainingError, "no step, however small, lowers the loss"),
        (double_logits, 5, ModelError, "contradict each other"),
    ],
)
def test_damage_that_the_manifest_agrees_with_is_found(
    files: dict[str, bytes],
    half: Selection,
    model: Model,
    tmp_path: Path,
    damage: Damage,
    before: int,
    kind: type[FedpruneError],
    message: str,
) -> None:
    done, error = passed_checks(save_files(tmp_path / "b", {**files, **damage(files, model, half)}, half))
    assert (done, type(error)) == (CHECKS[:before], kind)
    assert message in str(error)


def test_a_step_is_tried_at_its_own_widths(files: dict[str, bytes], model: Model) -> None:
    """A step in which a channel count stands as a number loads, and runs at full width only."""

    def frozen(proto: onnx.ModelProto) -> None:
        shape = model.tensors["bn2.bias"].shape
        proto.graph.initializer.append(numpy_helper.from_array(np.zeros(shape, np.float32), "wide"))
        for node in proto.graph.node:
            if node.output[0] == "bn2.bias::next":
                node.output[0] = "narrow"
        proto.graph.node.append(onnx.helper.make_node("Add", ["narrow", "wide"], ["bn2.bias::next"]))

    broken = change_model(files[TRAINING], frozen)
    try_step(model, Recipe(), {**files, WEIGHTS: tensorfile.encode(model.tensors), TRAINING: broken})
    with pytest.raises(ModelError, match="onnxruntime"):
        try_step(model, Recipe(), {**files, TRAINING: broken})


@pytest.mark.parametrize("ignored", [step_contract.Y_PARTNER, step_contract.Y_SHARE])
def test_a_training_step_that_does_not_mix_labels(model: Model, half: Selection, tmp_path: Path, ignored: str) -> None:
    """A step that takes a label for its own partner, or counts the first label alone."""

    def unmix_labels(proto: onnx.ModelProto) -> None:
        proto.graph.initializer.append(numpy_helper.from_array(np.array(1, np.float32), "all of it"))
        replacement = step_contract.Y if ignored == step_contract.Y_PARTNER else "all of it"
        for node in proto.graph.node:
            node.input[:] = [replacement if i == ignored else i for i in node.input]

    recipe = Recipe(mixup=0.3)
    files = bundle_files(model, half, recipe)
    folder = save_files(tmp_path / "b", {**files, TRAINING: change_model(files[TRAINING], unmix_labels)}, half, recipe)
    done, error = passed_checks(folder)
    assert (done, type(error)) == (CHECKS[:5], ModelError)
    assert "contradict" in str(error)


def dense_norm(bias: float) -> Model:
    """A layer with a new batch norm, whose scale and variance, and shift and mean, are equal tensors."""
    rng, node, value = np.random.default_rng(0), onnx.helper.make_node, onnx.helper.make_tensor_value_info
    ones, zeros = np.ones(6, np.float32), np.zeros(6, np.float32)
    tensors = {"v": rng.standard_normal((6, 4), np.float32), "w": rng.standard_normal((3, 6), np.float32)}
    tensors |= {"b": zeros + np.float32(bias), "c": ones[:3], "g": ones, "s": zeros, "m": zeros + bias, "u": ones}
    graph = onnx.helper.make_graph(
        [
            node("Gemm", ["i", "v", "b"], ["h"], transB=1),
            node("BatchNormalization", ["h", "g", "s", "m", "u"], ["n"]),
            node("Gemm", ["n", "w", "c"], ["o"], transB=1),
        ],
        "g",
        [value("i", 1, ["N", 4])],
        [value("o", 1, ["N", 3])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in tensors.items()],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    return import_onnx(proto.SerializeToString(), "dense norm")


@pytest.mark.parametrize("bias", [0.0, 1e6])
def test_what_rounding_does_to_a_model_is_no_fault(bias: float, tmp_path: Path) -> None:
    """Behind a large bias a batch norm's inputs are exact to a few hundredths; its bundle is right all the same."""
    model = dense_norm(bias)
    full = Selection.full(model.architecture)
    files = bundle_files(model, full, Recipe())
    findings = {check.name: check.finding for check in verify_bundle(save_files(tmp_path / "good", files, full), model)}
    assert [*findings] == [*CHECKS, "model"]
    assert ("amplifies rounding" in findings["agreement"]) is bool(bias)
    changed = {**files, **double_logits(files, model, full)}
    assert passed_checks(save_files(tmp_path / "changed", changed, full))[0] == CHECKS[:5]


def test_another_model_is_told_apart(files: dict[str, bytes], half: Selection, model: Model, tmp_path: Path) -> None:
    folder = save_files(tmp_path / "b", files, half)
    graph = model.graph.copy()
    graph.initializers["fc.weight"] = graph.initializers["fc.weight"] + np.float32(0.01)
    done, error = passed_checks(folder, Model(graph, model.architecture, model.notes, model.values))
    assert (done, type(error)) == (CHECKS, BundleError)
    assert "other weights than the model: expected 17 equal tensors, got 1 others, such as fc.weight" in str(error)


def test_the_command_speaks_json_also_of_what_is_wrong(
    files: dict[str, bytes], half: Selection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_files(tmp_path / "b", files, half)
    assert main(["verify", str(folder), "--json"]) == ExitCode.OK
    good = json.loads(capsys.readouterr().out)
    (folder / ARCHITECTURE).write_text("{}")
    assert main(["verify", str(folder), "--json"]) == ExitCode.BUNDLE
    output = capsys.readouterr()
    bad = json.loads(output.out)
    assert (good["ok"], [c["check"] for c in good["passed"]]) == (True, CHECKS)
    assert (bad["ok"], bad["passed"]) == (False, [])
    assert ARCHITECTURE in bad["error"]
    assert output.err.count("\n") == 1


def test_identifiers_are_drawn_from_the_whole_vocabulary(tmp_path: Path) -> None:
    """A bundle whose embedding is wrong in its last row only is told from the model."""
    model = import_onnx(token_net(9), "tokens")
    full = Selection.full(model.architecture)
    files = bundle_files(model, full, Recipe())
    assert passed_checks(save_files(tmp_path / "good", files, full), model) == ([*CHECKS, "model"], None)
    assert check_parity(model, full, files).value < 1e-6
    tensors = {n: v.copy() for n, v in tensorfile.decode(files[WEIGHTS]).items()}
    tensors["table"][-1] += 1
    with pytest.raises(ModelError, match="masked"):
        check_parity(model, full, {**files, WEIGHTS: tensorfile.encode(tensors)})


def test_damage_that_the_manifest_agrees_with_never_surprises(
    files: dict[str, bytes], half: Selection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Random changes of graphs, weights and tables end in an error of ours, or in none; nothing is printed."""
    folder = save_files(tmp_path / "b", files, half)
    random = np.random.default_rng(7)
    for round_ in range(60):
        name = FILES[round_ % len(FILES)]
        raw = bytearray(files[name])
        for at in random.integers(0, min(len(raw), 3000), 1 + round_ % 3):
            raw[at] ^= 1 << int(random.integers(8))
        broken = {**files, name: bytes(raw)}
        for file, content in broken.items():
            (folder / file).write_bytes(content)
        (folder / "manifest.json").write_text(manifest_text(broken, half, Recipe(), "raspberry-pi-5"))
        assert main(["verify", str(folder)]) in (ExitCode.OK, ExitCode.MODEL, ExitCode.BUNDLE, ExitCode.TRAINING), (
            name,
            round_,
        )
    output = capsys.readouterr()
    assert {line.partition(":")[0] for line in output.out.splitlines()} <= set(CHECKS)
    assert {line.partition(":")[0] for line in output.err.splitlines()} == {"error"}


def linear(outputs: int) -> Model:
    """A layer of 4 channels, and one of outputs."""
    rng, node, value = np.random.default_rng(0), onnx.helper.make_node, onnx.helper.make_tensor_value_info
    tensors = {"v": rng.standard_normal((5, 4), np.float32), "w": rng.standard_normal((4, outputs), np.float32)}
    graph = onnx.helper.make_graph(
        [node("MatMul", ["i", "v"], ["h"]), node("Tanh", ["h"], ["t"]), node("MatMul", ["t", "w"], ["o"])],
        "g",
        [value("i", 1, ["N", 5])],
        [value("o", 1, ["N", outputs])],
        [numpy_helper.from_array(v, k) for k, v in tensors.items()],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    return import_onnx(proto.SerializeToString(), "linear")


def test_a_step_that_learns_nothing_is_no_fine_export(tmp_path: Path) -> None:
    """The softmax of one output is always 1."""
    model = linear(1)
    with pytest.raises(TrainingError, match="moves no weight") as caught:
        fx.export(model, fx.plan(model, "raspberry-pi-5", recipe=Recipe()), tmp_path / "b")
    assert "bce" in caught.value.hint
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("loss", "outputs"), [("bce", 1), ("cross_entropy", 300)])
def test_what_is_exported_is_verified(loss: str, outputs: int, tmp_path: Path) -> None:
    model = linear(outputs)
    fx.export(model, fx.plan(model, "raspberry-pi-5", recipe=Recipe(loss=loss)), tmp_path / "b")
    assert passed_checks(tmp_path / "b", model) == ([*CHECKS, "model"], None)

"""Folders in the Hugging Face hub's layout: what is saved is loaded again, by others too; hostile ones are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import fedprune
import fedprune_export as fx
from fedprune.core import tensorfile
from fedprune.core.errors import ModelError
from fedprune.output.document import Table
from fedprune.output.tables import Column
from fedprune.runtime.bundle import open_bundle
from fedprune.runtime.session import OnnxSession
from fedprune_export.bundles.conversion import with_weights
from fedprune_export.importing.hub_folder import (
    HUB_CARD_FILE,
    HUB_CONFIG_FILE,
    HUB_FILES,
    HUB_GRAPH_FILE,
    HUB_WEIGHTS_FILE,
)
from fedprune_export.pruning.model import RANKS_KEY
from support.fakes.hub_server import fake_hub

torch = pytest.importorskip("torch")
hub = pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.torch

CARD_OF = fx.ModelCard(
    data="ten shapes × 8",
    metrics={"accuracy": 0.875, "loss": 0.25},
    classes=("round", "square"),
    license="apache-2.0",
    facts={"Strategy": "fedprune"},
    sections={"Plan": [Table([Column("boards")], [("raspberry-pi-5",)])]},
)


def net() -> Any:
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
    )


@pytest.fixture(scope="module")
def model() -> fx.Model:
    return fx.load(net(), input_shape=(1, 6, 6), name="shapes")


@pytest.fixture
def folder(model: fx.Model, tmp_path: Path) -> Path:
    return fx.save_pretrained(model, tmp_path / "saved", card=CARD_OF)


def change_weights(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = {name: np.array(value) for name, value in tensorfile.load_tensors(folder / HUB_WEIGHTS_FILE).items()}
    change(tensors)
    (folder / HUB_WEIGHTS_FILE).write_bytes(tensorfile.encode(tensors))


def test_a_saved_model_is_loaded_again(model: fx.Model, folder: Path) -> None:
    reloaded = fx.from_pretrained(folder)

    assert sorted(path.name for path in folder.iterdir()) == sorted(HUB_FILES)
    assert reloaded.architecture.digest == model.architecture.digest
    assert all(np.array_equal(reloaded.tensors[name], value) for name, value in model.tensors.items())
    assert fx.load(folder, name="other").architecture.name == "other"


def test_torch_and_onnxruntime_read_the_files(model: fx.Model, folder: Path) -> None:
    from safetensors.torch import load_file

    module = net()
    with torch.no_grad():
        module[0].weight.zero_()
    module.load_state_dict(load_file(folder / HUB_WEIGHTS_FILE))
    module.eval()
    x = np.random.default_rng(0).standard_normal((3, 1, 6, 6)).astype(np.float32)
    expected = OnnxSession(model.graph.to_bytes()).run({"x": x})["logits"]
    np.testing.assert_allclose(OnnxSession(folder / HUB_GRAPH_FILE).run({"x": x})["logits"], expected, atol=1e-5)
    np.testing.assert_allclose(module(torch.from_numpy(x)).detach().numpy(), expected, atol=1e-5)


def test_the_weights_file_wins_over_the_graphs_weights(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors["5.bias"].fill(7))
    assert fx.from_pretrained(folder).tensors["5.bias"].tolist() == [7, 7]
    (folder / HUB_WEIGHTS_FILE).unlink()
    assert fx.from_pretrained(folder).tensors["5.bias"].tolist() != [7, 7]


def test_the_card_is_what_the_hub_reads(folder: Path) -> None:
    card = hub.ModelCard.load(folder / HUB_CARD_FILE)

    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "fedprune"
    assert card.data.pipeline_tag == "image-classification"
    [accuracy, loss] = card.data.eval_results
    assert (accuracy.dataset_name, accuracy.dataset_type) == ("ten shapes × 8", "ten-shapes-8")
    assert (accuracy.metric_type, accuracy.metric_value, loss.metric_value) == ("accuracy", 0.875, 0.25)
    assert "| raspberry-pi-5 |" in card.text
    assert "1 × 6 × 6 inputs and 2 outputs" in card.text
    assert json.loads((folder / HUB_CONFIG_FILE).read_text())["id2label"] == {"0": "round", "1": "square"}


def test_class_names_go_along_from_a_folder_to_bundles_and_folders(folder: Path, tmp_path: Path) -> None:
    model = fx.from_pretrained(folder)
    assert model.class_names == ("round", "square")
    fx.export(model, fx.plan(model, "raspberry-pi-5"), tmp_path / "bundle")
    assert open_bundle(tmp_path / "bundle").class_names == ("round", "square")
    saved_again = fx.save_pretrained(with_weights(model, model.tensors, "x"), tmp_path / "again")
    assert fx.from_pretrained(saved_again).class_names == ("round", "square")
    fx.export(model, fx.plan(model, "raspberry-pi-5"), tmp_path / "bundle", class_names=("o", "x"))
    assert open_bundle(tmp_path / "bundle").class_names == ("o", "x")


def test_recorded_ranks_go_along_if_they_are_of_the_models_groups(model: fx.Model, tmp_path: Path) -> None:
    folder = fx.save_pretrained(with_weights(model, model.tensors, "x", (np.array([2, 0, 3, 1]),)), tmp_path / "saved")
    assert [r.tolist() for r in fx.load(folder).ranks or ()] == [[2, 0, 3, 1]]

    proto = onnx.load(folder / HUB_GRAPH_FILE)
    (ranks_entry,) = (p for p in proto.metadata_props if p.key == RANKS_KEY)
    for rows in ([[2, 0, 3]], [[0, 0, 1, 2]], [["a", 0, 1, 2]], [], 3):
        ranks_entry.value = json.dumps({**json.loads(ranks_entry.value), "ranks": rows})
        onnx.save(proto, folder / HUB_GRAPH_FILE)
        with pytest.raises(ModelError, match=r"fedprune\.ranks"):
            fx.load(folder)
    ranks_entry.value = json.dumps({"groups": "0" * 64, "ranks": [[0, 1]]})
    onnx.save(proto, folder / HUB_GRAPH_FILE)
    assert fx.load(folder).ranks is None


@pytest.mark.parametrize("config", [None, "{", "{}"], ids=["written", "damaged", "without a digest"])
def test_an_edited_card_stays(
    model: fx.Model, folder: Path, config: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / HUB_CARD_FILE).write_text("mine")
    (folder / HUB_GRAPH_FILE).write_text("damaged")
    if config is not None:
        (folder / HUB_CONFIG_FILE).write_text(config)
    for _ in range(2):
        caplog.clear()
        fx.save_pretrained(model, folder)
        assert (folder / HUB_CARD_FILE).read_text() == "mine"
        assert caplog.records[0].getMessage().startswith(f"{folder / HUB_CARD_FILE} was edited and is kept")
    assert fx.from_pretrained(folder).architecture.digest == model.architecture.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(evil=t["0.weight"]), r"has a tensor 'evil'.*expected weights of model\.onnx alone"),
        (lambda t: t.pop("0.weight"), r"tensor 0\.weight: expected a weight, got nothing"),
        (
            lambda t: t.update({"0.weight": t["0.weight"][:2]}),
            r"0\.weight\': expected float32 \[4, 1, 3, 3\], got float32 \[2,",
        ),
    ],
)
def test_other_weights_are_refused(folder: Path, change: Any, message: str) -> None:
    change_weights(folder, change)
    with pytest.raises(ModelError, match=message):
        fx.from_pretrained(folder)


@pytest.mark.parametrize("raw", ["{", "[]", '{"name": 3}', f'{{"name": "{"x" * 101}"}}'])
def test_a_hostile_config_is_one_error(folder: Path, raw: str) -> None:
    (folder / HUB_CONFIG_FILE).write_text(raw)
    with pytest.raises(ModelError, match=r"config\.json"):
        fx.from_pretrained(folder)


def test_a_repository_is_downloaded_by_the_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(repository: str, **options: Any) -> str:
        asked.append((repository, options))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    model = fx.from_pretrained("ann/other", revision="v1")
    assert model.architecture.digest == fx.from_pretrained(folder).architecture.digest
    assert asked == [
        ("ann/other", {"revision": "v1", "allow_patterns": [HUB_GRAPH_FILE, HUB_WEIGHTS_FILE, HUB_CONFIG_FILE]})
    ]
    assert fx.from_pretrained("ann/other", name="mine").architecture.name == "mine"
    (folder / HUB_CONFIG_FILE).unlink()
    assert fx.from_pretrained("ann/other").architecture.name == "other"


def test_the_library_sends_the_four_files_and_no_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own code speaks to a hub that is played: there is no account for the real one here."""
    (folder / "signing.key").write_text("secret")
    (folder / "epoch-3").mkdir()
    (folder / "epoch-3" / HUB_GRAPH_FILE).write_bytes(b"older")
    with fake_hub() as there:
        monkeypatch.setattr(hub.create_repo.__self__, "endpoint", there.url)
        address = fx.push_to_hub(folder, "ann/shapes", private=True, message="first")
        fx.push_to_hub(folder, "ann/shapes")
    files = {name: (folder / name).read_bytes() for name in HUB_FILES}
    assert [repository["organization"] + "/" + repository["name"] for repository in there.made] == ["ann/shapes"] * 2
    assert [repository["visibility"] for repository in there.made] == ["private", "public"]
    assert there.commits[0] == ("ann/shapes", "first", files)
    assert there.commits[1] == ("ann/shapes", f"Upload a model of fedprune {fedprune.__version__}", files)
    assert there.cards == [files[HUB_CARD_FILE].decode()] * 2
    assert address == f"{there.url}/ann/shapes/commit/{1:040x}"

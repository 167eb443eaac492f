"""Adapters beside frozen weights: what they compute, which channels they have, and how boards train them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import fedprune_export as fx
from fedprune.core.errors import BundleError, ModelError
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.model.step_contract import next_name
from fedprune.runtime.bundle import open_bundle
from fedprune.runtime.session import OnnxSession
from fedprune_device.data.dataset import LocalData
from fedprune_device.training.trainer import Trainer
from fedprune_device.training.training_task import TrainingTask
from fedprune_export.importing import ImportChoices, import_onnx, read_source
from fedprune_export.pruning.cut import cut
from fedprune_export.training.step_graph import training_graph
from support.nets.small_nets import Reader

pytestmark = pytest.mark.torch

N, RANK = 12, 8
ADAPTED = ("q.weight", "v.weight", "wide.weight")


class Low(nn.Module):
    """A frozen linear layer and an adapter, as PEFT has it."""

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base_layer, self.scale = base.requires_grad_(False), scale
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x)) * self.scale


def with_low(net: Reader, rank: int = RANK, scale: float = 1.0) -> Reader:
    """The net as PEFT would change it, frozen but for the adapters."""
    net.requires_grad_(False)
    for name in ("q", "v", "wide"):
        setattr(net, name, Low(getattr(net, name), rank, scale))
    return net


def with_values(module: nn.Module, model: fx.Model) -> nn.Module:
    """A module of `with_low` with a model's adapters."""
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in model.tensors.items():
            if ".lora_" in name:
                parameters[name.replace(".weight", ".default.weight")].copy_(torch.tensor(value))
    return module


def net() -> Reader:
    torch.manual_seed(0)
    return Reader()


def random(model: fx.Model) -> fx.Model:
    """B not of zeros, so that the adapters count."""
    rng = np.random.default_rng(5)
    for name in model.tensors:
        if "lora_B" in name:
            shape = model.graph.initializers[name].shape
            model.graph.initializers[name] = rng.normal(size=shape, scale=0.3).astype(np.float32)
    return model


def outputs(graph: Any, x: Any) -> Any:
    return OnnxSession(graph.to_bytes()).run({"x": x}, ["logits"])["logits"]


def samples(count: int = N) -> tuple[Any, Any]:
    rng = np.random.default_rng(1)
    return rng.integers(0, 11, (count, *Reader.input_shape)), rng.integers(0, 5, count)


def test_the_first_model_computes_what_the_base_does() -> None:
    base, adapted = fx.load(net()), fx.load(net(), lora=fx.Lora(RANK))
    x, _ = samples()
    assert np.array_equal(outputs(base.graph, x), outputs(adapted.graph, x))
    assert {n for n in adapted.tensors if n not in base.tensors} == {
        f"{w.removesuffix('.weight')}.{factor}.weight" for w in ADAPTED for factor in ("lora_A", "lora_B")
    }
    assert adapted.tensors["wide.lora_A.weight"].shape == (RANK, 16)
    assert adapted.tensors["wide.lora_B.weight"].shape == (24, RANK)


def test_ranks_are_the_only_channels() -> None:
    model = fx.load(net(), lora=fx.Lora(RANK))
    assert model.architecture.sizes == (RANK,) * 3
    members = [set(model.architecture.members(i)) for i in range(3)]
    names = [w.removesuffix(".weight") for w in ADAPTED]
    assert members == [{f"{n}.lora_A.weight[0]", f"{n}.lora_B.weight[1]"} for n in names]
    assert set(model.frozen) == set(fx.load(net()).tensors)
    assert not [note for note in model.notes if "stay" in note]


def test_adapters_of_peft_are_known() -> None:
    module = with_low(net())
    model, ours = fx.load(module), fx.load(net(), lora=fx.Lora(RANK))
    assert model.architecture.sizes == ours.architecture.sizes
    assert set(model.frozen) == {n for n, p in module.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_narrow_adapters_are_sums_of_fewer_ranks(alpha: float | None) -> None:
    scale = 1.0 if alpha is None else alpha / RANK
    model = random(fx.load(net(), lora=fx.Lora(RANK, alpha=alpha)))
    x, _ = samples()
    module = with_values(with_low(net(), scale=scale), model)
    assert np.allclose(outputs(model.graph, x), module(torch.tensor(x)).detach(), atol=1e-5)
    ranks = [np.random.default_rng(i).permutation(RANK) for i in range(3)]
    some = Selection.of(model.architecture, [3, 5, 2], ranks)
    with torch.no_grad():
        for name, order, width in zip(("q", "v", "wide"), ranks, some.widths, strict=True):
            module.get_submodule(name).lora_B["default"].weight[:, order[width:]] = 0
    assert np.allclose(outputs(cut(model, some), x), module(torch.tensor(x)).detach(), atol=1e-5)


@pytest.mark.parametrize("width", [RANK, 3])
def test_boards_train_adapters_as_torch_does_and_leave_the_base(width: int) -> None:
    model = random(fx.load(net(), lora=fx.Lora(RANK, alpha=2 * RANK)))
    selection, (x, y) = Selection.of(model.architecture, [width] * 3), samples()
    module = with_low(net(), width, 2.0)
    tensors = selection.gather(model.tensors)
    with torch.no_grad():
        for name, value in tensors.items():
            if ".lora_" in name:
                module.get_parameter(name.replace(".weight", ".default.weight")).copy_(torch.tensor(value))
    recipe = Recipe(batch_size=N, lr=0.1, momentum=0.0, epochs=3)
    result = Trainer(training_graph(model, recipe.features).to_bytes(), threads=1).train(
        tensors, LocalData(x, y, x[:1], y[:1]), TrainingTask(recipe, 5, 0, "a", 1)
    )
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(torch.tensor(x)), torch.tensor(y)).backward()
        optimizer.step()
    for name, value in tensors.items():
        if ".lora_" in name:
            expected = module.get_parameter(name.replace(".weight", ".default.weight"))
            assert np.allclose(result.tensors[name], expected.detach(), atol=1e-5), name
            assert not np.array_equal(result.tensors[name], value), name
        else:
            assert np.array_equal(result.tensors[name], value), name


def test_a_recipe_trains_more_than_adapters() -> None:
    model = fx.load(net(), lora="2:q.weight")
    recipe = Recipe(trainable=("*.lora_*", "out.*"))
    output_names = {o.name for o in training_graph(model, recipe.features).outputs}
    trained = {t.name for t in model.architecture.tensors if next_name(t.name) in output_names}
    assert trained == {"q.lora_A.weight", "q.lora_B.weight", "out.weight", "out.bias"}


def test_a_file_with_adapters_is_read_again(tmp_path: Path) -> None:
    onnx.save(onnx.load_from_string(fx.load(net()).graph.to_bytes()), tmp_path / "net.onnx")
    raw = read_source(tmp_path / "net.onnx", ImportChoices(lora="4:q.weight,v.*"))
    assert raw == read_source(tmp_path / "net.onnx", ImportChoices(lora=fx.Lora(4, ("q.weight", "v.*"))))
    model = import_onnx(raw, "net")
    assert model.architecture.sizes == (4, 4)
    reloaded = import_onnx(model.graph.to_bytes(), "net")
    assert reloaded.architecture.digest == model.architecture.digest
    assert reloaded.frozen == model.frozen
    (tmp_path / "adapted.onnx").write_bytes(raw)
    with pytest.raises(ModelError, match=r"q\.weight"):
        fx.load(tmp_path / "adapted.onnx", lora="2:q.weight")


@pytest.mark.parametrize(
    ("lora", "error"),
    [
        ("8:k.weight", r"no weight of a linear layer is called 'k\.weight'.*q\.weight, v\.weight, wide\.weight, out\."),
        ("6:out.weight", r"rank of out\.weight: expected at most 5, got 6"),
    ],
)
@pytest.mark.at_push(2)
def test_wrong_adapters_are_refused(lora: str, error: str) -> None:
    with pytest.raises(ModelError, match=error):
        fx.load(net(), lora=lora)


@pytest.mark.parametrize("base", ["float16", "int8"])
def test_a_board_steps_beside_a_low_base_as_torch_does_in_float64(base: str, tmp_path: Path) -> None:
    model = random(fx.load(net(), lora=fx.Lora(RANK, alpha=2 * RANK), base=base))
    assert set(model.tensors) == {n for n in model.graph.initializers if ".lora_" in n}
    module = with_low(net(), scale=2.0).double()
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name in (n for n in parameters if ".lora_" not in n):
            stored = model.graph.initializers[name.replace(".base_layer.", ".")]
            assert np.abs(stored - parameters[name].numpy()).max() <= np.abs(stored).max() / 200, name
            parameters[name].copy_(torch.tensor(stored))
    with_values(module, model)
    (tmp_path / "base").write_bytes(model.base_file or b"")
    (x, y), recipe = samples(), Recipe(batch_size=N, lr=0.1, momentum=0.0, epochs=1)
    graph = training_graph(model, recipe.features)
    assert {n.op for n in graph.nodes} >= ({"Cast"} if base == "float16" else {"Cast", "DequantizeLinear"})
    trainer = Trainer(graph.to_bytes(), threads=1, base=tmp_path / "base")
    assert set(trainer.names) == set(model.tensors)
    result = trainer.train(model.tensors, LocalData(x, y, x[:1], y[:1]), TrainingTask(recipe, 5, 0, "a", 1))
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    nn.functional.cross_entropy(module(torch.tensor(x)), torch.tensor(y)).backward()
    optimizer.step()
    for name, value in model.tensors.items():
        expected = parameters[name.replace(".weight", ".default.weight")].detach().numpy()
        assert np.linalg.norm(result.tensors[name] - expected) <= 1e-5 * np.linalg.norm(expected - value) + 1e-6, name
        assert not np.array_equal(result.tensors[name], value), name


@pytest.mark.parametrize("base", ["float16", "int8"])
def test_a_low_base_stays_the_same_bytes_through_files(base: str, tmp_path: Path) -> None:
    model = fx.load(with_low(net()), base=base)
    reloaded = import_onnx(model.graph.to_bytes(), model.architecture.name)
    assert reloaded.architecture.digest == model.architecture.digest
    assert reloaded.base_file == model.base_file
    fx.export(model, fx.plan(model, "raspberry-pi-5", recipe=Recipe(batch_size=2), density=0.5), tmp_path / "out")
    assert open_bundle(tmp_path / "out").architecture.base == model.architecture.base
    assert (tmp_path / "out" / "base.safetensors").read_bytes() == model.base_file
    (tmp_path / "out" / "base.safetensors").unlink()
    with pytest.raises(BundleError):
        open_bundle(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"base": "float8", "lora": "4"}, "base: expected float16 or int8"),
        ({"base": "int8"}, "base 'int8': expected a model with frozen weights"),
    ],
)
def test_wrong_bases_are_refused(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ModelError, match=error):
        fx.load(net(), **options)


def test_weights_beyond_float16_are_refused() -> None:
    module = net()
    with torch.no_grad():
        module.q.weight[0, 0] = 1e6
    with pytest.raises(ModelError, match=r"q\.weight"):
        fx.load(module, lora="4", base="float16")

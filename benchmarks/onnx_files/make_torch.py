"""Files of torch's two exporters: `python -m benchmarks.onnx_files.make_torch`.

With every file a step of SGD is taken in torch, in float64, and its outputs before and after are kept. Where the
exporter has folded a batch norm into a convolution, the file's weight is W' = s·W with s = γ/√(σ² + ε), whose
gradient is that of W over s: a step on W' is one on W at the rate lr/s².
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.onnx_files import picture_nets
from benchmarks.onnx_files.shelf import SAMPLES, Facts, Made, count_norms, installed, open_shelf
from benchmarks.onnx_files.torch_files import ENDS, FILES, NETS, Export, Net

LEARNING_RATE = 0.05


class Ended(nn.Module):
    """A net with the end that its file has."""

    def __init__(self, net: nn.Module, end: str) -> None:
        super().__init__()
        self.net, self.end = net, end

    def forward(self, *inputs: Tensor) -> Any:
        outputs = self.net(*inputs)
        return ENDS[self.end](outputs) if self.end else outputs


def samples(net: Net, seed: int = 5) -> dict[str, Any]:
    """Random samples of a net's inputs."""
    random, arrays = np.random.default_rng(seed), {}
    for name, form in net.inputs.items():
        if isinstance(form[0], str):
            kind, bound, *shape = form
            arrays[name] = random.integers(0, bound, (SAMPLES, *shape)).astype(kind)
        else:
            arrays[name] = random.standard_normal((SAMPLES, *form)).astype(np.float32)
    return arrays


def make_net(net: Net) -> nn.Module:
    """The net in evaluation mode, with weights as after training: exporters merge tensors that are equal."""
    torch.manual_seed(0)
    module = net.make().eval()
    generator = torch.Generator().manual_seed(1)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.8, 1.5, generator=generator)
    # Layers that torch copied, and norms and biases, are equal before the first step.
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.requires_grad_(True)
            parameter += torch.empty_like(parameter).uniform_(-0.1, 0.1, generator=generator)
    return module


def export(name: str, how: Export, path: Path) -> Made:
    """Write a file."""
    net = NETS[name]
    module, arrays = make_net(net), samples(net)
    ended = Ended(copy.deepcopy(module), how.end).eval()
    axis = 1 if how.second else 0
    batch = how.batch or 2
    inputs = tuple(torch.from_numpy(np.moveaxis(a[:batch], 0, axis).copy()) for a in arrays.values())
    if how.dtype != torch.float32:
        ended.to(how.dtype)
        inputs = tuple(x.to(how.dtype) if x.is_floating_point() else x for x in inputs)
    with torch.no_grad():
        sample = ended(*inputs)
    outputs = ["output"] if isinstance(sample, Tensor) else [f"output{i}" for i in range(len(sample))]
    names: dict[str, Any] = {"input_names": [*net.inputs], "output_names": outputs, "opset_version": how.opset}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how.dynamo:
            shapes = [{} if how.batch else {axis: torch.export.Dim("batch")} for _ in inputs]
            program = torch.onnx.export(
                ended, inputs, dynamo=True, dynamic_shapes=(tuple(shapes),), **names, verbose=False, **how.options
            )
            program.save(path)
        else:
            free = {} if how.batch else {n: {axis if n in net.inputs else 0: "batch"} for n in (*net.inputs, *outputs)}
            torch.onnx.export(ended, inputs, str(path), dynamo=False, dynamic_axes=free, **names, **how.options)
    axes = dict.fromkeys(net.inputs, 1) if how.second else {}
    exporter = f"torch {torch.__version__.partition('+')[0]}, {'dynamo' if how.dynamo else 'legacy'}"
    if net.package != "torch":
        exporter += f" ({net.package} {installed(net.package)})"
    facts = Facts(kind=name, exporter=exporter, loss=net.loss, batch=how.batch, axes=axes, refused=how.refused)
    facts.choices = dict(how.choices)
    halves = how.dtype == torch.float16
    facts.rounding = "float16" if halves else "int8" if net.make is picture_nets.Qat else "float32"
    step: dict[str, Any] = {}
    if facts.rounding == "float32" and not how.refused:
        step = step_of(module, arrays, net.loss, axis=axis, norms=count_norms(path))
    kind = {torch.float16: np.float16, torch.float64: np.float64}.get(how.dtype, np.float32)
    arrays = {name: a.astype(kind) if a.dtype.kind == "f" else a for name, a in arrays.items()}
    return facts, {f"in.{name}": a for name, a in arrays.items()} | step


def step_of(module: nn.Module, arrays: Mapping[str, Any], loss: str, *, axis: int, norms: int) -> dict[str, Any]:
    """Labels, and a net's outputs before and after a step, in float64; nothing where the file trains something else.
    `axis` is where the net has the batch."""
    net = copy.deepcopy(module).double()
    inputs = [torch.from_numpy(np.moveaxis(a, 0, axis).copy()) for a in arrays.values()]
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    layers = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before, scales = _flat(net(*inputs)), {} if norms else _scales(net, inputs)
    # Exporters fold a weight norm into its weight, which then is what trains.
    if norms + len(scales) != len(layers) or any(map(nn.utils.parametrize.is_parametrized, net.modules())):
        return {}
    labels = _labels(net(*inputs), loss)
    if norms:
        for layer in layers:
            layer.train()
    loss_of(net(*inputs), labels, loss).backward()
    folded_gains = {norm.weight for _, norm in scales.values()} | {layer.bias for layer, _ in scales.values()}
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.grad is None or parameter in folded_gains:
                continue
            if parameter in scales:
                folded, norm = scales[parameter]
                s = norm.weight / torch.sqrt(norm.running_var + norm.eps)
                along = 1 if getattr(folded, "transposed", False) else 0
                parameter.grad /= s.view([-1 if i == along else 1 for i in range(parameter.ndim)]) ** 2
            parameter -= LEARNING_RATE * parameter.grad
        net.eval()
        after = _flat(net(*inputs))
    return {"y": labels.numpy(), "before": before.detach().numpy(), "after": after.numpy()}


def _scales(net: nn.Module, inputs: list[Tensor]) -> dict[Tensor, tuple[nn.Module, nn.Module]]:
    """The convolution and the norm that reads its output, by the convolution's weight."""
    makers: dict[int, nn.Module] = {}
    kept: list[Tensor] = []
    pairs: dict[Tensor, tuple[nn.Module, nn.Module]] = {}

    def note(layer: nn.Module, _: Any, output: Tensor) -> None:
        makers[id(output)] = layer
        kept.append(output)  # so that no other output gets its id

    def pair(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        layer = makers.get(id(args[0]))
        if layer is not None:
            pairs[layer.weight] = layer, norm

    hooks = []
    for layer in net.modules():
        if isinstance(layer, nn.modules.conv._ConvNd):
            hooks.append(layer.register_forward_hook(note))
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            hooks.append(layer.register_forward_pre_hook(pair))
    net(*inputs)
    for hook in hooks:
        hook.remove()
    return pairs


def _labels(outputs: Any, loss: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if loss == "own":
        return torch.zeros(SAMPLES, dtype=torch.int64)
    if loss == "cross_entropy":
        n, classes, *places = outputs.shape
        return torch.randint(0, classes, (n, *places), generator=generator)
    if loss == "bce":
        return torch.randint(0, 2, outputs.shape, generator=generator).float()
    return torch.randn(outputs.shape, generator=generator)


def loss_of(outputs: Any, labels: Tensor, loss: str) -> Tensor:
    """A batch's loss, as fedprune defines it."""
    if loss == "own":
        return sum(o.square().flatten(1).mean(1) for o in outputs).mean()
    if loss == "cross_entropy":
        return nn.functional.cross_entropy(outputs, labels)
    if loss == "bce":
        return nn.functional.binary_cross_entropy_with_logits(outputs, labels.double())
    return nn.functional.mse_loss(outputs, labels.double())


def _flat(outputs: Any) -> Tensor:
    parts = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    return torch.cat([p.flatten(1) for p in parts], 1)


def file_name(name: str, how: Export) -> str:
    """Such as `resnet-legacy-17-batch1-softmax`."""
    parts = [name, "dynamo" if how.dynamo else "legacy", str(how.opset), f"batch{how.batch}" if how.batch else ""]
    parts.append("" if how.dtype == torch.float32 else str(how.dtype).removeprefix("torch."))
    return "-".join(filter(None, [*parts, how.end, "training" if how.options else ""]))


def main() -> None:
    shelf = open_shelf(__doc__, "torch", "onnxscript")
    for name, exports in FILES.items():
        if installed(package := NETS[name].package) is None:
            print(f"SKIPPED: {name}: {package} is not installed", flush=True)
            continue
        for how in exports:
            shelf.add(file_name(name, how), partial(export, name, how))


if __name__ == "__main__":
    main()

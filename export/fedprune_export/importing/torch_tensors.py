"""Compares the tensors of an exported file with those of its torch module, and records what only the module knows.

Which tensors are trainable, unused, frozen and tied is written into the file's metadata.
"""

from __future__ import annotations

import json
from typing import Any

import onnx

from fedprune.core.errors import ModelError
from fedprune_export.importing import metadata
from fedprune_export.ir.instance_norms import INSTANCE_NORMS_KEY


def record_tensors(torch: Any, module: Any, samples: tuple[Any, ...], proto: onnx.ModelProto, name: str) -> None:
    """Give tensors their first name, and record which are trainable, unused, frozen and tied."""
    # A tied parameter is one tensor under several names; they all get the first one.
    by_id: dict[int, str] = {}
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    first_names = {n: by_id.setdefault(id(tensor), n) for n, tensor in tensors}
    _rename_initializers(proto, first_names)
    parameters = dict(module.named_parameters())
    initializer_names = {t.name for t in proto.graph.initializer}
    unused = [n for n in parameters if n not in initializer_names]
    # A file may lack a parameter that the outputs do not depend on. Any other was fused or folded by the exporter, and
    # the import would train another model.
    lost = _used_parameters(torch, module, samples, {n: parameters[n] for n in unused})
    if lost:
        raise ModelError(
            f"{name}: weights were lost or fused in the export",
            expected=f"{len(parameters)} tensors",
            got=f"{len(parameters) - len(lost)} (without {', '.join(lost[:5])})",
            hint="Please report this with the module.",
        )
    exported = [n for n in parameters if n in initializer_names]
    # Running statistics are buffers for PyTorch; here they are cut and averaged with the parameters.
    statistics = _statistics(module, torch.nn.modules.batchnorm._NormBase, initializer_names)
    instance_norms = _statistics(module, torch.nn.modules.instancenorm._InstanceNorm, initializer_names)[::2]
    aliases: dict[str, list[str]] = {}
    for alias, first in first_names.items():
        if alias != first:
            aliases.setdefault(first, []).append(alias)
    frozen = [n for n in exported if not parameters[n].requires_grad]
    facts = {metadata.UNUSED_KEY: unused, metadata.FROZEN_KEY: frozen, metadata.TIED_KEY: aliases}
    facts[INSTANCE_NORMS_KEY] = instance_norms
    texts = {metadata.PARAMETERS_KEY: json.dumps([*exported, *statistics])}
    texts |= {key: json.dumps(fact) for key, fact in facts.items() if fact}
    onnx.helper.set_model_props(proto, texts)


def _statistics(module: Any, kind: Any, exported: set[str]) -> list[str]:
    """The exported running statistics of norms of a kind: mean and variance of each."""
    return [
        name
        for prefix, submodule in module.named_modules()
        if isinstance(submodule, kind)
        for field in ("running_mean", "running_var")
        if (name := f"{prefix}.{field}" if prefix else field) in exported
    ]


def _used_parameters(torch: Any, module: Any, samples: tuple[Any, ...], parameters: dict[str, Any]) -> list[str]:
    """The names of the parameters on which the module's outputs depend."""
    if not parameters:
        return []
    required_gradients = {n: p.requires_grad for n, p in parameters.items()}
    try:
        # Frozen parameters count, too: a gradient only shows that an output depends on one.
        for value in parameters.values():
            value.requires_grad_(True)
        with torch.enable_grad():
            result = module(*samples)
            outputs = [o for o in (result if isinstance(result, (tuple, list)) else [result]) if o.requires_grad]
            gradients = [None] * len(parameters)
            if outputs:
                gradients = torch.autograd.grad(
                    sum(o.sum() for o in outputs), list(parameters.values()), allow_unused=True
                )
    finally:
        for name, value in parameters.items():
            value.requires_grad_(required_gradients[name])
    return [n for n, gradient in zip(parameters, gradients, strict=True) if gradient is not None]


def _rename_initializers(proto: onnx.ModelProto, names: dict[str, str]) -> None:
    """Rename initialisers; those that become the same are the same tensor."""
    if all(old == new for old, new in names.items()):
        return
    tensors = {t.name: t for t in proto.graph.initializer if names.get(t.name, t.name) == t.name}
    for tensor in list(proto.graph.initializer):
        new = names.get(tensor.name, tensor.name)
        if new == tensor.name:
            continue
        if new in tensors:
            proto.graph.initializer.remove(tensor)
        else:
            tensor.name = new
            tensors[new] = tensor
    for node in proto.graph.node:
        for i, value in enumerate(node.input):
            node.input[i] = names.get(value, value)
    for info in list(proto.graph.value_info):
        if names.get(info.name, info.name) != info.name:
            proto.graph.value_info.remove(info)

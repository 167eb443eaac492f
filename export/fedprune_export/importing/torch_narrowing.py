"""Narrows a torch module to the weights of a submodel: the same layers, with fewer channels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ModelError
from fedprune.model.step_contract import RESERVED_NAMES
from fedprune_export.importing.torch_loading import torch_package

Module = TypeVar("Module")

Shape = tuple[int, ...]

_HINT = "Build the module at this width yourself, and load the tensors into it."


def narrowed(module: Module, tensors: Mapping[str, npt.NDArray[np.float32]]) -> Module:
    """Cut a torch module down to the shapes of a submodel's tensors, load them into it, and return it.

    Layers get their new sizes (`out_channels`, `num_features`, ...), too. Numbers in the module's own `forward`, such
    as a `view` to 128 features, stay. Parameters stay on their device and of their type. Raises
    `ModelError` if names don't fit, a tensor is larger than the module's, or a layer is of a kind whose size its
    weights don't tell: grouped convolutions that aren't depthwise, group norms of several groups, recurrent layers,
    attention, and any other module with parameters; `MissingExtraError` if torch is not installed.

    Args:
        module: The whole model, of the same code as the one that was imported. It is changed.
        tensors: A submodel's weights and statistics, by their names in the state dict.
    """
    torch = torch_package()
    if not isinstance(module, torch.nn.Module):
        raise ModelError("what is to be narrowed", expected="a torch module", got=type(module).__name__)
    names = {id(value): name for name, value in (*module.named_parameters(), *module.named_buffers())}
    tensors = {_author_name(n, set(names.values())): v for n, v in tensors.items()}
    unknown = sorted(set(tensors) - set(names.values()))
    if unknown:
        raise ModelError(f"the module has no tensor {unknown[0]!r}", got=f"{len(unknown)} such names")
    lacking = sorted(n for n, _ in module.named_parameters() if n not in tensors)
    if lacking:
        raise ModelError(f"there is no tensor for {lacking[0]!r} of the module", got=f"{len(lacking)} such names")
    # All layers are looked at before the first is changed.
    plans = [
        (layer, _new_attributes(torch, prefix or type(layer).__name__, layer, names, tensors))
        for prefix, layer in module.named_modules()
    ]
    # By the address of an old tensor, which is kept alive so that no other object gets the address.
    replacements: dict[int, tuple[Any, Any]] = {}
    for layer, attributes in plans:
        for name, size in attributes.items():
            setattr(layer, name, size)
        for own_tensors in (layer._parameters, layer._buffers):
            for name, value in [*own_tensors.items()]:
                array = tensors.get(names.get(id(value), ""))
                if array is None:
                    continue
                # Layers that share a tensor share the new one, too.
                if id(value) not in replacements:
                    new = torch.tensor(array, dtype=value.dtype, device=value.device)
                    if isinstance(value, torch.nn.Parameter):
                        new = torch.nn.Parameter(new, requires_grad=value.requires_grad)
                    replacements[id(value)] = (new, value)
                own_tensors[name] = replacements[id(value)][0]
    return module


def _author_name(name: str, author_names: AbstractSet[str]) -> str:
    """The module's own name of a tensor: the import appends `_` to reserved names, such as `lr`."""
    stripped = name.rstrip("_")
    return stripped if name not in author_names and stripped in author_names & RESERVED_NAMES else name


def _new_attributes(
    torch: Any, where: str, layer: Any, names: Mapping[int, str], tensors: Mapping[str, npt.NDArray[np.float32]]
) -> dict[str, Any]:
    """A layer's attributes for its new tensors; none if these have the old shapes. Raises `ModelError` if they don't
    fit."""
    old: dict[str, Shape] = {}
    new: dict[str, Shape] = {}
    for name, value in (*layer._parameters.items(), *layer._buffers.items()):
        if (array := tensors.get(names.get(id(value), ""))) is not None:
            old[name], new[name] = tuple(value.shape), array.shape
            if len(array.shape) != value.ndim or any(a > b for a, b in zip(array.shape, value.shape, strict=True)):
                raise ModelError(f"{where}.{name} can't be narrowed", expected=f"at most {old[name]}", got=new[name])
    return {} if old == new else _size_attributes(torch, where, layer, old, new)


def _check_forward(where: str, layer: Any) -> None:
    """Make sure that a layer computes what torch's layer does, because only then do its attributes give its sizes.

    Raises `ModelError` if it, or a class of it that isn't torch's, computes in a way of its own.
    """
    for name in ("forward", "_conv_forward"):
        function = getattr(layer, name, None)
        is_custom = name in vars(layer) or not getattr(function, "__module__", "").startswith("torch.nn.")
        if function is not None and is_custom:
            raise ModelError(
                f"{where}: a {type(layer).__name__} with a {name} of its own can't be narrowed by its weights alone",
                expected="a layer of torch.nn",
                hint=_HINT,
            )


def _size_attributes(
    torch: Any, where: str, layer: Any, old: dict[str, Shape], new: dict[str, Shape]
) -> dict[str, Any]:
    """A layer's attributes for weights of these sizes.

    Raises `ModelError` if its kind is unknown, or its weights don't determine them.
    """
    nn = torch.nn
    _check_forward(where, layer)
    one = next(iter(new.values()))
    shape = new.get("weight", one)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if layer.groups == 1:
            return {"out_channels": shape[0], "in_channels": shape[1]}
        # Depthwise: the weight has one row per channel, so its length gives the groups.
        if layer.groups == layer.in_channels == layer.out_channels:
            return {"out_channels": shape[0], "in_channels": shape[0], "groups": shape[0]}
    elif isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        if layer.groups == 1:
            return {"in_channels": shape[0], "out_channels": shape[1]}
    # Exactly this class: torch's attention has a subclass whose size its own attributes repeat.
    elif type(layer) is nn.Linear:
        return {"out_features": shape[0], "in_features": shape[1]}
    elif isinstance(layer, (nn.modules.batchnorm._NormBase)):
        return {"num_features": shape[0]}
    elif isinstance(layer, nn.GroupNorm):
        if layer.num_groups == 1:
            return {"num_channels": shape[0]}
        if layer.num_groups == layer.num_channels:
            return {"num_channels": shape[0], "num_groups": shape[0]}
    elif isinstance(layer, (nn.LayerNorm, getattr(nn, "RMSNorm", nn.LayerNorm))):
        return {"normalized_shape": tuple(shape)}
    elif type(layer) is nn.Embedding and shape[0] == old["weight"][0]:
        return {"embedding_dim": shape[1]}
    elif isinstance(layer, nn.PReLU):
        return {"num_parameters": math.prod(shape)}
    raise ModelError(
        f"{where}: a {type(layer).__name__} like this can't be narrowed by its weights alone",
        got=f"{old} to {new}",
        hint=_HINT,
    )

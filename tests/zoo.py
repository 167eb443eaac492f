"""Published networks that tests use as well: timm's, also where torchvision isn't installed."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import warnings
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import nets

NETS = ("lenet", "vgg11_bn", "resnet20_bn", "concat_net", "resnet18")


class _Member(type):
    """A class any of whose members is its name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Anything(ModuleType):
    """A stand-in for a module of torchvision: timm imports it for image transforms and operators we don't use."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Member(name, (), {})


class _Torchvision:
    """Finds stand-ins for all modules of a torchvision that isn't installed."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, _Torchvision, is_package=True)  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Anything(spec.name)

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        """Nothing to run."""


def timm_model(name: str, size: int = 64, **arguments: Any) -> nn.Module:
    """A network of timm with ten classes for images of `size`."""
    if "timm" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_Torchvision)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timm = pytest.importorskip("timm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nets.seeded(timm.create_model(name, num_classes=10, **arguments))
    module.input_shape = (3, size, size)
    return module


def make(name: str) -> nn.Module:
    """A network of `NETS` by name."""
    return timm_model(name) if name == "resnet18" else getattr(nets, name)()

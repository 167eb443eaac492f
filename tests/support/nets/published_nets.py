"""Published networks for tests, timm's among them."""

import importlib.util
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from fedprune_export.importing.timm_models import torchvision_or_placeholder
from support.marks import mark_soak
from support.nets import small_nets as nets

NETS = ("lenet", "vgg11_bn", "resnet20_bn", "concat_net", "resnet18")
MARKED = mark_soak(NETS, soak=NETS[-1:])
"""`NETS` as parameters. Only `make soak` runs the largest."""

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")


def timm_model(name: str, size: int = 64, **arguments: Any) -> nn.Module:
    """A network of timm with ten classes for images of `size`."""
    with warnings.catch_warnings(), torchvision_or_placeholder():
        warnings.simplefilter("ignore")
        timm = pytest.importorskip("timm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nets.randomise_norms(timm.create_model(name, num_classes=10, **arguments))
    module.input_shape = (3, size, size)
    return module


def make(name: str) -> nn.Module:
    """A network of `NETS` by name."""
    return timm_model(name) if name == "resnet18" else getattr(nets, name)()

"""The compiler: import a model, plan it for a board, and export what the board trains.

    import fedprune_export as fx

    model = fx.load("net.onnx")                 # or a torch module, or "timm:resnet18"
    print(model.groups)                         # which channels can only be cut together
    plan = fx.plan(model, "raspberry-pi-4b", bytes_per_round=300_000)
    report = fx.export(model, plan, "bundle/")  # what `fedprune-export` prints

Importing the package costs nothing: each name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedprune_export.api import export
    from fedprune_export.bundles.board_plan import BoardPlan, plan
    from fedprune_export.bundles.hub_repository import ModelCard, from_pretrained, push_to_hub, save_pretrained
    from fedprune_export.checks.labelled_data import LabelledData
    from fedprune_export.importing.adapters import Lora
    from fedprune_export.importing.load import load
    from fedprune_export.importing.torch_narrowing import narrowed
    from fedprune_export.model_options import ImportChoices
    from fedprune_export.pruning.cut import cut
    from fedprune_export.pruning.model import Model
    from fedprune_export.reports.report import Report
    from fedprune_export.training.step_graph import training_step

__all__ = [
    "BoardPlan",
    "ImportChoices",
    "LabelledData",
    "Lora",
    "Model",
    "ModelCard",
    "Report",
    "cut",
    "export",
    "from_pretrained",
    "load",
    "narrowed",
    "plan",
    "push_to_hub",
    "save_pretrained",
    "training_step",
]

_MODULES = {
    "BoardPlan": "bundles.board_plan",
    "ImportChoices": "model_options",
    "LabelledData": "checks.labelled_data",
    "Lora": "importing.adapters",
    "Model": "pruning.model",
    "ModelCard": "bundles.hub_repository",
    "Report": "reports.report",
    "cut": "pruning.cut",
    "export": "api",
    "from_pretrained": "bundles.hub_repository",
    "load": "importing.load",
    "narrowed": "importing.torch_narrowing",
    "plan": "bundles.board_plan",
    "push_to_hub": "bundles.hub_repository",
    "save_pretrained": "bundles.hub_repository",
    "training_step": "training.step_graph",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

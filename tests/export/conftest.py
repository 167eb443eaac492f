"""Models that several tests of the compiler use, imported once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedprune_export.pruning.model import Model
from fedprune_server.simulation.digits import digits_model


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model as a file, which tests only read."""
    path = tmp_path_factory.mktemp("models") / "digits.onnx"
    path.write_bytes(digits_model())
    return path


@pytest.fixture(scope="session")
def imported() -> Callable[[str], Model]:
    """Imports a network of `zoo.NETS` by name, each only once."""
    from fedprune_export.importing import export_torch, import_onnx
    from support.nets import published_nets as zoo

    models: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in models:
            models[name] = import_onnx(export_torch(zoo.make(name)), name)
        return models[name]

    return get

"""A server's state folder: what a job may begin with."""

import numpy as np
import pytest

from fedprune.errors import DataError
from fedprune_server.config import ServerConfig
from fedprune_server.digits import digits_model, load_digits
from fedprune_server.state_folder import StateFolder


@pytest.fixture
def config(tmp_path):
    """A configuration whose calibration file holds what it is given."""
    (tmp_path / "model.onnx").write_bytes(digits_model())

    def write(**arrays):
        np.savez(tmp_path / "calibration.npz", **arrays)
        return ServerConfig(model=str(tmp_path / "model.onnx"), calibration=str(tmp_path / "calibration.npz"))

    return write


def test_calibration_samples_need_no_labels(config, tmp_path):
    with StateFolder(tmp_path / "state") as folder:
        assert folder.open_job(config(x=load_digits()[0][:20])).state.model


def test_calibration_samples_of_another_shape_are_named(config, tmp_path):
    with StateFolder(tmp_path / "state") as folder, pytest.raises(DataError, match=r"calibration\.npz: shape"):
        folder.open_job(config(x=load_digits()[0][:20, :, :4]))

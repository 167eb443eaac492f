"""What tests of several parts of the server have in common."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from fedprune_export.importing import import_onnx
from fedprune_export.pruning.model import Model
from fedprune_server.simulation.digits import digits_model
from support.fakes.fleet import Fleet
from support.processes.postgres import Postgres
from support.processes.s3 import S3, Ceph, Moto


@pytest.fixture(scope="session")
def model() -> Model:
    """The demo's model."""
    return import_onnx(digits_model(), "digits")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server for databases that don't need it to be killed."""
    with closing(Postgres()) as made:
        made.start()
        yield made


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A Ceph cluster takes a minute to start: a push runs what moto, a mock, is enough for."""
    for item in items:
        callspec = getattr(item, "callspec", None)  # only a test with parameters has one
        parameters = [value for value in callspec.params.values() if isinstance(value, str)] if callspec else []
        if "ceph" in [*getattr(item, "fixturenames", ()), *parameters]:
            item.add_marker(pytest.mark.soak)


@pytest.fixture(scope="session")
def moto() -> Iterator[S3]:
    """A mock of S3, in a process of its own."""
    with closing(Moto()) as made:
        yield made


@pytest.fixture(scope="session")
def ceph() -> Iterator[Ceph]:
    """A small Ceph cluster with its S3 gateway."""
    with closing(Ceph()) as made:
        yield made


@pytest.fixture
def at_s3(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3:
    """A server of S3, where boto3 looks for it: moto, or the one that a test's parameter names."""
    s3: S3 = request.getfixturevalue(getattr(request, "param", "moto"))
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return s3


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    """A server's folder, an air and devices."""
    return Fleet(tmp_path)


@pytest.fixture(scope="session")
def expected() -> str:
    """The model that an undisturbed run ends with."""
    with TemporaryDirectory() as folder:
        return Fleet(Path(folder)).run().model

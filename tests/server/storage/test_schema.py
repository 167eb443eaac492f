"""Databases of another version or program are refused, and left as they are."""

import pytest
import sqlalchemy as sql

from fedprune.core.errors import StorageError
from fedprune_server.storage.open_database import FORMAT
from fedprune_server.storage.storage import Storage
from fedprune_server.storage.tables import META


def test_tables_of_another_program_are_let_alone(url: str) -> None:
    engine = sql.create_engine(url)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE devices (id INTEGER PRIMARY KEY)")
    for _ in range(2):
        with pytest.raises(StorageError):
            Storage(url)
        assert sql.inspect(engine).get_table_names() == ["devices"]
    engine.dispose()


@pytest.mark.parametrize("version", ["fedprune.database/0", None])
def test_a_database_of_another_version_is_refused_and_left_alone(url: str, version: str | None) -> None:
    with Storage(url) as storage:
        storage.put_settings({"job": {"name": "job"}})
        with storage.database.transaction() as connection:
            row = META.c.key == "format"
            change = META.delete() if version is None else META.update().values(value=version)
            connection.execute(change.where(row))
            connection.exec_driver_sql("DROP TABLE events")
    for create in (True, False):
        with pytest.raises(StorageError) as caught:
            Storage(url, create=create)
        assert (caught.value.expected, caught.value.got) == (FORMAT, version or "none")
        assert caught.value.hint
    engine = sql.create_engine(url)
    assert "events" not in sql.inspect(engine).get_table_names()
    engine.dispose()

"""Alembic's environment: runs the migrations on the connection, and in the transaction, that `schema_migration` has
opened.
"""

from __future__ import annotations

from alembic import context

from fedprune_server.storage.tables import TABLES

context.configure(connection=context.config.attributes["connection"], target_metadata=TABLES, compare_type=True)
with context.begin_transaction():
    context.run_migrations()

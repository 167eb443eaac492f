"""Connections to a PostgreSQL database: how soon a vanished machine is noticed, and how long locks are waited for."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sql

_CONNECT_OPTIONS = {
    # A machine that vanished is noticed: in half a minute, not in the two hours of TCP's own default.
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
    "application_name": "fedprune-server",
}

# Seconds after which PostgreSQL ends a session that does nothing within a transaction, because its process is stopped
# or its machine gone. As long as a server's lease: a leader that froze within a transaction keeps it no longer than one
# that froze outside. The pauses between our own statements are milliseconds.
TRANSACTION_IDLE_S = 15

# Seconds for which PostgreSQL itself waits for a lock. Between two such waits the process shows that it is alive, and
# can be stopped.
LOCK_TIMEOUT_S = 2.0

_SESSION_SETTINGS = {
    # The same for the database's side, which may be sending rows to a machine that has vanished.
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "5",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "30s",
}

_LOCK_HOLDERS_QUERY = """
SELECT concat('session ', pid, ' of ', application_name, ' from ', coalesce(host(client_addr), 'this machine'))
FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
    AND xact_start < clock_timestamp() - make_interval(secs => :seconds)
ORDER BY xact_start
"""


def postgresql_engine(url: sql.URL, *, read_only: bool) -> sql.Engine:
    """An engine whose connections are tested before each use, and get the settings above as they open."""
    options = {k: v for k, v in _CONNECT_OPTIONS.items() if k not in url.query}
    engine = sql.create_engine(url, connect_args=options, pool_pre_ping=True)
    if read_only:
        engine = engine.execution_options(postgresql_readonly=True)
    sql.event.listen(engine, "connect", _tune_postgresql)
    return engine


def lock_holders(connection: sql.Connection) -> list[str]:
    """Descriptions of the sessions that have been in a transaction for longer than ours has waited for a lock."""
    sessions = connection.execute(sql.text(_LOCK_HOLDERS_QUERY), {"seconds": LOCK_TIMEOUT_S})
    return [str(text) for text in sessions.scalars()]


def _tune_postgresql(connection: Any, record: object) -> None:
    with connection.cursor() as cursor:
        # A commit must be on the disk, as with SQLite's FULL. Stricter settings (remote_apply) stay.
        cursor.execute("SELECT set_config('synchronous_commit', 'on', false) "
                       "WHERE current_setting('synchronous_commit') IN ('off', 'local')")  # fmt: skip
        limits = {
            "idle_in_transaction_session_timeout": f"{TRANSACTION_IDLE_S}s",
            "lock_timeout": f"{1000 * LOCK_TIMEOUT_S:.0f}ms",
        }
        for name, value in (_SESSION_SETTINGS | limits).items():
            cursor.execute("SELECT set_config(%s, %s, false)", (name, value))
    connection.commit()

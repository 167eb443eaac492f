"""Keys of the table [server], by what their values are."""

from __future__ import annotations

TEXTS = (
    "site",
    "broker",
    "ca",
    "host",
    "state",
    "database",
    "blobs",
    "profiles",
    "blob_url",
    "serve_blobs",
    "workers_url",
    "log_format",
    "metrics",
    "traces",
    "console",
    "console_certificate",
    "console_key",
    "console_hosts",
    "console_orders",
    "console_releases",
    "on_revocation",
)
NUMBERS = (
    "port",
    "keep",
    "pulls",
    "receivers",
    "workers",
    "max_devices",
    "max_packet",
    "cache_mib",
    "board_logs",
)
SWITCHES = ("archive", "slabs", "console_insecure", "console_proxy")
REALS = ("weight",)
SERVER = (*TEXTS, *NUMBERS, *SWITCHES, *REALS)
"""All of them."""

PATHS = ("profiles", "ca", "console_certificate", "console_key", "console_releases")
"""Texts that name files and folders, beside `state`."""

ELSEWHERE = ("state", "database", "on_revocation")
"""What the database doesn't keep: what the state folder itself is, or says, and a command, which whoever can write to
the database mustn't choose."""

"""The record `fedprune` of a message between server and node: everything except weights."""

from __future__ import annotations

from fedprune.core.errors import ProtocolError, value_text

# The record's name in a message's content.
RECORD_NAME = "fedprune"

FORMAT = "fedprune.flower/1"

# The type of the message in which a node is asked for its density or profile; its app answers `@app.query("fedprune")`.
ASKING_TYPE = "query.fedprune"

# Metric: the optimiser steps behind an update.
STEPS_METRIC = "num-steps"


def check_format(record: object) -> None:
    """Check that a record is of this format. Raises `ProtocolError` if the record has another format, or none."""
    format_name = record.get("format") if hasattr(record, "get") else None
    if format_name != FORMAT:
        raise ProtocolError(
            f"record {RECORD_NAME!r} of a message",
            expected=FORMAT,
            got="nothing" if format_name is None else value_text(format_name),
            hint="Does the ServerApp use FedpruneStrategy of the same version?",
        )

"""A server that hangs: it lives, and renews its lease no more."""

from fedprune_server.engine.state_folder import StateFolder


def hang(folder: StateFolder) -> None:
    """Stop renewing the lease, as a process does that hangs or was killed."""
    folder.lease._closed.set()
    thread = folder.lease._thread
    assert thread is not None
    thread.join()

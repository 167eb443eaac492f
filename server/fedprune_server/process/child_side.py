"""The child's side of a child process: it ends with its parent, and keeps its standard output for its replies."""

from __future__ import annotations

import os
import signal
from typing import BinaryIO

from fedprune.core.parent_death import set_parent_death_signal


def end_with_parent(parent: int) -> None:
    """End this process when its parent, of process id `parent`, ends; ignore Ctrl-C, which is for the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_parent_death_signal(signal.SIGTERM)
    # The kernel sends no signal for a parent that ended before it was asked to.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def reply_stream() -> BinaryIO:
    """A stream to the parent; what libraries print to standard output goes to standard error from now on."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return replies
